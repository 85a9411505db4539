"""Log lines on stderr: one JSON object an event, or a short line on a terminal; secrets never."""

import json
import logging
import re
import sys
from datetime import UTC, datetime

#: The password of any url: ``scheme://user:password@host`` or ``scheme://:password@host``. It ends at the
#: last @, as clients read it: a password may hold one itself.
_SECRET = re.compile(r"(\w+://[^\s:/@]*:)\S+(@)")
#: The same as a parameter, which Redis urls allow too.
_SECRET_PARAMETER = re.compile(r"(password=)[^&\s]+")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def redacted(text: str) -> str:
    """The text with the passwords of all urls in it replaced."""
    return _SECRET_PARAMETER.sub(r"\1***", _SECRET.sub(r"\1***\2", text))


class JsonLines(logging.Formatter):
    """``timestamp``, ``level``, ``msg``, ``service``, ``role`` and whatever was given as ``extra``."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        event = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "msg": record.getMessage(),
            "service": "jobworker",
            "role": self._role,
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return redacted(json.dumps(event, ensure_ascii=False, default=str))


class ForPeople(logging.Formatter):
    """``12:00:01 warning reader: message key=value``."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback below it where there is one."""
        extra = [f"{k}={v}" for k, v in vars(record).items() if k not in _STANDARD]
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{clock} {record.levelname.lower():7} {self._role}: {record.getMessage()}"
        line = " ".join([line, *extra])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return redacted(line)


class _Unfailing(logging.StreamHandler):  # type: ignore[type-arg]
    """A full disk or a closed stderr must not break the path that settles jobs."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line."""


def set_up(role: str, level: str, form: str) -> None:
    """Send every logger's lines to stderr in one form; ``form`` is ``json`` or ``text``."""
    handler = _Unfailing(sys.stderr)
    handler.setFormatter(JsonLines(role) if form == "json" else ForPeople(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Libraries tell at INFO what concerns nobody at night.
    for noisy in ("httpx", "sentence_transformers", "urllib3", "pymilvus"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
