"""A role that is to be filled: who fills it, how often it was lost, and what is said of it."""

from .channel import STOPPING
from .process import Child
from .respawn import Respawn


class Place:
    """While workers are exchanged, ``successor`` is the next child."""

    def __init__(self, role: str, slot: int = 0) -> None:
        self.role = role
        self.slot = slot
        self.generation = 0
        self.child: Child | None = None
        self.successor: Child | None = None
        self.respawn = Respawn()
        #: Ends that nobody had asked for.
        self.losses = 0

    def children(self) -> list[Child]:
        """Whoever is there."""
        return [child for child in (self.child, self.successor) if child]

    def reasons(self) -> list[str]:
        """Why the service is not ready for its part; nothing where it is."""
        found = []
        if self.child is None or not self.child.ready:
            found.append(
                f"{self.role} {self.slot} is starting" if self.role == "worker" else f"no {self.role}"
            )
        if self.child is not None and self.child.trouble:
            found.append(f"{self.child.name}: {self.child.trouble}")
        return found


def state(child: Child | None) -> str:
    """What a child does: of a worker ``starting``, ``idle``, ``busy`` or ``stopping``."""
    if child is None or not child.ready:
        return "starting"
    if child.channel is None:
        return "stopping" if child.stopping else "running"
    if child.stopping or child.channel.phase == STOPPING:
        return "stopping"
    return "busy" if child.channel.mono_deadline_s else "idle"
