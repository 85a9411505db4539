"""Log lines on stderr: one JSON object an event, or a short line on a terminal; secrets never."""

import json
import logging
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from ..settings import Settings
from .current_job import current_log_fields
from .log_limit import RateLimitFilter, is_summary

#: Where the password of any URL begins: ``scheme://user:`` or ``scheme://:``.
_BEFORE_PASSWORD = re.compile(r"(?<=\w://)[^\s:/@]*:")
_BLANK = re.compile(r"\s")
#: The same as a parameter, which Redis URLs and database names allow too.
_SECRET_PARAMETER = re.compile(r"(password=)([^&\s]+)")
#: Keys as HTTP clients show them.
_BEARER = re.compile(r"((?:Bearer|Basic) )([A-Za-z0-9._~+/=-]{8,})")
#: Variables of our own and of tracing that hold nothing but secrets.
_SECRET_VARIABLE = re.compile(r"(JOBWORKER|OTEL)_\w*(KEY|TOKEN|PASSWORD|SECRET|HEADERS)")
#: A shorter secret would be found in the middle of words; in a url it is seen all the same.
_SHORTEST_SECRET = 6
#: Longest text of a field or message: a whole error of a handler (`outcome.MAX_ERROR_CHARS`) fits.
MAX_TEXT_CHARS = 4096
#: Longest traceback: some hundred frames.
MAX_TRACEBACK_CHARS = 32 * 1024
#: Items of a list or mapping that are written.
MAX_ITEMS = 64
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

#: This process's own secrets, as one pattern; see `hide`.
_hidden: re.Pattern[str] | None = None


def redacted(text: str) -> str:
    """The text without the passwords of all URLs in it and without the secrets given to `hide`.

    It takes time linear in the length of any text: every producer can bring text into log lines.
    """
    if "://" in text:
        text = _without_passwords(text)
    text = _SECRET_PARAMETER.sub(r"\1***", text)
    text = _BEARER.sub(r"\1***", text)
    return _hidden.sub("***", text) if _hidden else text


def _without_passwords(text: str) -> str:
    parts, done = [], 0
    for start, end in _passwords(text):
        parts += [text[done:start], "***"]
        done = end
    return "".join([*parts, text[done:]])


def _passwords(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of the password of every URL. It ends at the last ``@`` before a blank, as clients read
    it: a password may hold one itself.

    Each word of the text is looked at once. One pattern for all of this would be quadratic.
    """
    place = 0
    while begin := _BEFORE_PASSWORD.search(text, place):
        start = begin.end()
        blank = _BLANK.search(text, start)
        place = blank.start() if blank else len(text)
        end = text.rfind("@", start + 1, place)
        if end >= 0:
            yield start, end


def bounded(text: str, most: int = MAX_TEXT_CHARS) -> str:
    """The text, or its beginning and end if it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def hide(secrets: Iterable[str]) -> None:
    """Replace these in every text from now on, in any position, instead of those given before."""
    global _hidden
    long_enough = [one for one in secrets if len(one) >= _SHORTEST_SECRET]
    # Also as they look inside of another text's quotes.
    forms = {form for one in long_enough for form in (one, repr(one)[1:-1], json.dumps(one)[1:-1])}
    long_first = sorted(forms, key=len, reverse=True)
    _hidden = re.compile("|".join(map(re.escape, long_first))) if long_first else None


def secrets_of(settings: Settings, environment: Mapping[str, str]) -> set[str]:
    """Every password, key and token that the service was given, as it stands and as it is meant."""
    texts = [str(getattr(settings, name)) for name in settings.secret_urls]
    found = {text[start:end] for text in texts for start, end in _passwords(text)}
    found |= {match[2] for text in texts for match in _SECRET_PARAMETER.finditer(text)}
    for name in settings.secret_tokens:
        token = str(getattr(settings, name))
        found |= {token, token.partition(":")[2]}
    for name, value in environment.items():
        if _SECRET_VARIABLE.fullmatch(name):
            # Headers are a list of name=value; of keys and tokens that is the whole.
            found |= {value, *(part.partition("=")[2].strip() for part in value.split(","))}
    for name in settings.secret_files:
        if path := str(getattr(settings, name)):
            found.add(_content(path))
    return found | {unquote(secret) for secret in found}


def _content(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").strip()
    except (OSError, ValueError):  # the role that needs it reports it
        return ""


def _safe(value: Any) -> Any:
    """A field without secrets, bounded, in kinds that JSON has."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_text(str(key)): _safe(one) for key, one in islice(value.items(), MAX_ITEMS)}
    if isinstance(value, list | tuple):
        left_out = [f"[... {len(value) - MAX_ITEMS} items ...]"] if len(value) > MAX_ITEMS else []
        return [_safe(one) for one in value[:MAX_ITEMS]] + left_out
    return _text(str(value))


def _text(text: str, most: int = MAX_TEXT_CHARS) -> str:
    """Without secrets, then bounded: a password that is cut in half would not be found."""
    return bounded(redacted(text), most)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as ``extra``, and before it the job that it is about."""
    extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    # Spans are sent beside whatever job happens to run.
    beside = is_summary(record) or str(record.name).startswith("opentelemetry")
    about = {} if beside else current_log_fields()
    return {key: _safe(value) for key, value in {**about, **extra}.items()}


class JsonLines(logging.Formatter):
    """``timestamp``, ``level``, ``msg``, ``service``, ``role``, the job that is run, and the ``extra``."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        event = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "msg": _text(record.getMessage()),
            "service": "jobworker",
            "role": self._role,
            **_fields(record),
        }
        if record.exc_info:
            event["exception"] = _text(self.formatException(record.exc_info), MAX_TRACEBACK_CHARS)
        return json.dumps(event, ensure_ascii=False)


class ForPeople(logging.Formatter):
    """``12:00:01 warning reader: message key=value``."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback below it where there is one."""
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{clock} {record.levelname.lower():7} {self._role}: {_text(record.getMessage())}"
        line = " ".join([line, *(f"{key}={value}" for key, value in _fields(record).items())])
        if record.exc_info:
            line += "\n" + _text(self.formatException(record.exc_info), MAX_TRACEBACK_CHARS)
        return line


class _Unfailing(logging.StreamHandler):  # type: ignore[type-arg]
    """A full disk or a closed stderr must not break the path that settles jobs."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._repeats = RateLimitFilter(self._emit_alone)
        self.addFilter(self._repeats)

    def _emit_alone(self, record: logging.LogRecord) -> None:
        self.acquire()
        try:
            self.emit(record)
        finally:
            self.release()

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line."""

    def close(self) -> None:
        """Say what was held back of repeated events."""
        self._repeats.close()
        super().close()


def configure(role: str, settings: Settings, environment: Mapping[str, str]) -> None:
    """Set up logging of a process of the service, before anything else.

    Warnings and the exception that ends the process become log events too. Secrets are redacted in all of
    them.
    """
    hide(secrets_of(settings, environment))
    set_up(role, settings.log_level, settings.log_format)
    logging.captureWarnings(True)
    sys.excepthook = _log_crash
    threading.excepthook = _log_thread_crash


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("jobworker").critical("process.crashed", exc_info=(kind, error, trace))


def _log_thread_crash(end: threading.ExceptHookArgs) -> None:
    if end.exc_value is not None and not isinstance(end.exc_value, SystemExit):
        _log_crash(end.exc_type, end.exc_value, end.exc_traceback)


def set_up(role: str, level: str, form: str) -> None:
    """Send every logger's lines to stderr in one form; ``form`` is ``json`` or ``text``."""
    handler = _Unfailing()
    handler.setFormatter(JsonLines(role) if form == "json" else ForPeople(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Libraries log details at INFO that no operator needs.
    for noisy in ("httpx", "sentence_transformers", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
