"""The role ``api`` and its supervisor: readiness, reports, and the request to stop."""

import logging

from .errors import Exit
from .ipc.control import ALIVE_EVERY_S, ControlSocket, Drain, Ready, StartFailed
from .outcome import MAX_ERROR_CHARS
from .telemetry.metrics import MetricsBuffer
from .telemetry.trace import part, request

__all__ = ["ApiLink", "part", "request"]

log = logging.getLogger("jobworker.api")


class ApiLink:
    """Connection to the supervisor. Its descriptor is readable when there is a message."""

    def __init__(self, control: ControlSocket) -> None:
        self._control = control
        #: Metrics of this process until the next report.
        self.metrics = MetricsBuffer()

    def fileno(self) -> int:
        """File descriptor, for an event loop."""
        return self._control.fileno()

    def ready(self) -> None:
        """Tell that requests are answered from now on."""
        self._control.send(Ready())

    def failed(self, error: str) -> None:
        """Tell why this process cannot start; it exits with `Exit.BOOT_FAILED` afterwards."""
        log.critical("api.start_failed", extra={"error": error})
        self._control.send(StartFailed(error[:MAX_ERROR_CHARS], Exit.BOOT_FAILED))

    def report(self, trouble: str | None = None) -> None:
        """Send the metrics. A process that is ready and does not report for 15 s is restarted."""
        self._control.report(self.metrics, trouble, at_least_every_s=ALIVE_EVERY_S)

    def stop_requested(self) -> bool:
        """Whether the supervisor asks this process to stop, or has exited."""
        try:
            while (received := self._control.receive()) is not None:
                if isinstance(received[0], Drain):
                    return True
        except EOFError:
            return True
        return False
