"""Processes that stand by to be the next reader or reaper: most of an absence would be their imports."""

from collections.abc import Iterator

from .process import Child
from .respawn import Respawn
from .settings import Settings

#: One for each of the two: where both end within a second, there is no time to start another in between.
_SPARES = 2


class Spares:
    """Up to two; iterating gives those that are there."""

    def __init__(self) -> None:
        self._children: list[Child | None] = [None] * _SPARES
        self._respawn = Respawn()

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
            if wanted and self._children[number] is None and not self._respawn.wait_s(now):
                self._children[number] = fresh = Child(now)
                fresh.stand_by(number, settings)

    def forget(self) -> None:
        """They have been ended and closed."""
        self._children = [None] * _SPARES
