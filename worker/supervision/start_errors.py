"""Errors before the service runs: a plain line, or the event config.invalid with the log format ``json``."""

import logging
import os
import resource
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import IO, Any

import click

from ..errors import ConfigurationError, Exit
from ..options import ENV_PREFIX, ServiceCommand
from ..telemetry import log as logs
from ..telemetry.line_writer import write_briefly

log = logging.getLogger("jobworker.supervisor")

#: What a supervisor opens without workers, with the descriptors that its HTTP server keeps free.
_BASE_OPEN_FILES = 112
#: What it opens for each worker: rings, pipes, a pidfd.
_OPEN_FILES_PER_WORKER = 9
_OPTION = "--log-format"
_FORMATS = ("json", "text")


def refuse(error: str, log_format: str) -> None:
    """Say on stderr why the service does not start, in a form that fits the rest of its log."""
    if log_format == "text":
        write_briefly(2, f"jobworker-supervise: {error}\n".encode("utf-8", "backslashreplace"))
        return
    if not logging.getLogger().handlers:
        logs.set_up("supervisor", "info", log_format)
    log.critical("config.invalid", extra={"error": error, "hint": "see jobworker-supervise --help"})


def require_open_files(workers: int) -> None:
    """Raises `ConfigurationError` if the limit on open files is too low for a supervisor of these workers.

    It would refuse every probe, to keep the last descriptors for restarts of workers.
    """
    needed = _BASE_OPEN_FILES + workers * _OPEN_FILES_PER_WORKER
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise ConfigurationError(
            f"only {allowed} open files are allowed, and {workers} workers need {needed}: "
            f"raise the limit (ulimit -n {needed}, or LimitNOFILE={needed} of systemd)"
        )


def default_format() -> str:
    """The log format if no option names one."""
    return "text" if sys.stderr is not None and sys.stderr.isatty() else "json"


class RefusingCommand(ServiceCommand):
    """Command of the service that reports bad usage by `refuse`."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        given = list(args)  # parsing empties the list
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            if _format_of(given, error.ctx) == "text":
                raise
            raise _LoggedError(error.format_message()) from None


class _LoggedError(click.ClickException):
    exit_code = Exit.USAGE

    def show(self, file: IO[Any] | None = None) -> None:
        refuse(self.message, "json")


def _format_of(args: Sequence[str], context: click.Context | None) -> str:
    """The log format that is asked for, as far as it can be known while another option is wrong."""
    given = [word.partition("=")[2] for word in args if word.startswith(f"{_OPTION}=")]
    given += [word for option, word in pairwise(args) if option == _OPTION]
    in_file = (context.default_map or {}).get("log_format", "") if context else ""
    for one in (*given, os.environ.get(f"{ENV_PREFIX}_LOG_FORMAT", ""), in_file):
        if one in _FORMATS:
            return str(one)
    return default_format()
