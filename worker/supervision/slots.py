"""Process slots (a role, its child and restarts) and warm standbys for reader and reaper."""

import logging
from collections.abc import Callable, Iterator

from ..ipc.channel import STOPPING
from ..settings import Settings
from .process import Child, RestartBackoff

log = logging.getLogger("jobworker.process_manager")


class Slot:
    """One position in the service: a role, the child that fills it and its restart backoff.

    During a restart of workers ``successor`` is the next child. ``generation`` numbers the children.
    """

    def __init__(self, role: str, number: int = 0) -> None:
        self.role = role
        self.number = number
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
            worker = f"{self.role} {self.number} is starting"
            reasons.append(worker if self.role == "worker" else f"no {self.role}")
        if self.child is not None and self.child.trouble:
            reasons.append(f"{self.child.name}: {self.child.trouble}")
        return reasons

    def is_restarting(self) -> bool:
        """Whether this is a worker that starts and has not failed at it: no operator is needed."""
        is_starting = self.child is None or not self.child.ready
        return self.role == "worker" and is_starting and not self.backoff.exits_before_ready


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


#: One each for reader and reaper: if both exit within a second, there is no time to start another between.
STANDBYS = 2
#: Time between two starts, so that the first is through its imports even on a busy machine.
_START_INTERVAL_S = 0.5


class Standbys:
    """Warm standby processes for reader and reaper, at most `STANDBYS`. Iterates over the living ones."""

    def __init__(self, new_child: Callable[[float], Child] = Child) -> None:
        self._new_child = new_child
        self._children: list[Child | None] = [None] * STANDBYS
        self._backoff = RestartBackoff()
        self._mono_last_start_s = 0.0

    def __iter__(self) -> Iterator[Child]:
        return (child for child in self._children if child is not None)

    def take(self) -> Child | None:
        """Remove and return the oldest standby, whose imports are furthest; None if there is none."""
        child = min(self, key=lambda child: child.mono_started_s, default=None)
        if child is not None:
            self._children[self._children.index(child)] = None
        return child

    def maintain(self, settings: Settings, now: float, *, wanted: bool) -> None:
        """Collect standbys that exited and, if ``wanted``, start at most one that is missing."""
        for number, child in enumerate(self._children):
            if child is not None and child.collect() is not None:
                self._backoff.record_exit(now, was_ready=False, lived_s=now - child.mono_started_s)
                child.close()
                self._children[number] = None
            due = now - self._mono_last_start_s > _START_INTERVAL_S and not self._backoff.wait_s(now)
            if wanted and due and self._children[number] is None:
                self._mono_last_start_s = now
                try:
                    self._children[number] = child = self._new_child(now)
                except OSError as error:
                    log.error("child.spawn_failed", extra={"child": "standby", "error": str(error)})
                    self._backoff.record_exit(now, was_ready=False, lived_s=0.0)
                    return
                child.make_standby(number, settings)

    def clear(self) -> None:
        """Forget all standbys, which the caller has ended and closed."""
        self._children = [None] * STANDBYS
