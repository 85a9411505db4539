"""Process slots: a role, its child and its restarts."""

from ..ipc.channel import STOPPING
from .process import Child, RestartBackoff


class Slot:
    """One position in the service: a role, the child that fills it and its restart backoff.

    During a restart of workers ``successor`` is the next child. ``generation`` numbers the children.
    """

    def __init__(self, role: str, number: int = 0) -> None:
        self.role = role
        self.number = number
        self.name = f"{role} {number}" if role == "worker" else role
        self.generation = 0
        self.child: Child | None = None
        self.successor: Child | None = None
        self.backoff = RestartBackoff()
        #: Exits that the supervisor did not request.
        self.unexpected_exits = 0

    def children(self) -> list[Child]:
        """The running children of this slot."""
        return [child for child in (self.child, self.successor) if child]

    def reasons(self) -> list[str]:
        """Why this slot is not ready; empty if it is."""
        reasons = []
        if self.child is None or not self.child.ready:
            reasons.append(f"{self.name} is starting" if self.role == "worker" else f"no {self.role}")
        if self.child is not None and self.child.trouble:
            reasons.append(f"{self.child.name}: {self.child.trouble}")
        return reasons

    def is_restarting(self) -> bool:
        """Whether this is a worker or the api that starts and has not failed at it: no operator is needed."""
        is_starting = self.child is None or not self.child.ready
        return self.role in ("worker", "api") and is_starting and not self.backoff.exits_before_ready


def state(child: Child | None) -> str:
    """State of a child for /status and metrics.

    A worker is ``starting``, ``idle``, ``busy`` or ``stopping``; others are ``running`` instead of idle or
    busy.
    """
    if child is None or not child.ready:
        return "starting"
    if child.channel is None:
        return "stopping" if child.stopping else "running"
    if child.stopping or child.channel.phase == STOPPING:
        return "stopping"
    return "busy" if child.channel.mono_deadline_s else "idle"
