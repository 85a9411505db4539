"""A process that stands by to be the next reader or reaper: most of an absence would be its imports."""

from .process import Child
from .respawn import Respawn
from .settings import Settings


class Spare:
    """At most one. `child` is it, for whoever waits for processes or ends them all."""

    def __init__(self) -> None:
        self.child: Child | None = None
        self._respawn = Respawn()

    def take(self) -> Child | None:
        """It, to begin in a role, where there is one."""
        child, self.child = self.child, None
        return child

    def keep(self, settings: Settings, now: float, *, wanted: bool) -> None:
        """Notice its end; start another where one is wanted."""
        if self.child is not None and self.child.collect() is not None:
            self._respawn.ended(now, was_ready=False, lived_s=now - self.child.mono_started_s)
            self.child.close()
            self.child = None
        if wanted and self.child is None and not self._respawn.wait_s(now):
            self.child = Child(now)
            self.child.stand_by(settings)
