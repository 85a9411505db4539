"""Processes that stand by to be the next reader or reaper: most of an absence would be their imports."""

from collections.abc import Iterator

from .process import Child
from .respawn import Respawn
from .settings import Settings

#: One for each of the two: where both end within a second, there is no time to start another in between.
SPARES = 2
#: One after the other: so long after the first is behind its imports, on a busy machine, too.
_APART_S = 0.5


class Spares:
    """Up to two; iterating gives those that are there."""

    def __init__(self) -> None:
        self._children: list[Child | None] = [None] * SPARES
        self._respawn = Respawn()
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
        self._children = [None] * SPARES
