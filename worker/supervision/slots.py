"""Process slots (a role, its child and restarts) and warm standbys for reader and reaper."""

from collections.abc import Iterator

from ..ipc.channel import STOPPING
from ..settings import Settings
from .process import Child, RestartBackoff


class Slot:
    """While workers are exchanged, ``successor`` is the next child."""

    def __init__(self, role: str, slot: int = 0) -> None:
        self.role = role
        self.slot = slot
        self.generation = 0
        self.child: Child | None = None
        self.successor: Child | None = None
        self.backoff = RestartBackoff()
        #: Exits that were not requested.
        self.unexpected_exits = 0

    def children(self) -> list[Child]:
        """The running children of this slot."""
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


#: One for each of the two: where both end within a second, there is no time to start another in between.
STANDBYS = 2
#: One after the other: so long after the first is behind its imports, on a busy machine, too.
_APART_S = 0.5


class Standbys:
    """Up to two; iterating gives those that are there."""

    def __init__(self) -> None:
        self._children: list[Child | None] = [None] * STANDBYS
        self._respawn = RestartBackoff()
        self._mono_begun_s = 0.0

    def __iter__(self) -> Iterator[Child]:
        return (child for child in self._children if child is not None)

    def take(self) -> Child | None:
        """The one that has stood by for longest, to begin in a role."""
        child = min(self, key=lambda child: child.mono_started_s, default=None)
        if child is not None:
            self._children[self._children.index(child)] = None
        return child

    def keep(self, settings: Settings, now: float, *, wanted: bool) -> None:
        """Notice their ends; start others where they are wanted."""
        for number, child in enumerate(self._children):
            if child is not None and child.collect() is not None:
                self._respawn.ended(now, was_ready=False, lived_s=now - child.mono_started_s)
                child.close()
                self._children[number] = None
            due = now - self._mono_begun_s > _APART_S and not self._respawn.wait_s(now)
            if wanted and due and self._children[number] is None:
                self._mono_begun_s = now
                self._children[number] = fresh = Child(now)
                fresh.stand_by(number, settings)

    def forget(self) -> None:
        """They have been ended and closed."""
        self._children = [None] * STANDBYS
