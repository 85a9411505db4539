"""Log lines on stderr: one JSON object per event, or one text line on a terminal, without secrets."""

# The escaped forms of a secret: orjson escapes no letters.
import json
import logging
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from ..safe_text import escape_control, safe_json, text_of
from ..settings import Settings
from . import line_writer
from .current_job import current_log_fields
from .line_writer import LineWriter, write_all
from .log_limit import DEFAULT_MAX_LINES, RateLimitFilter, is_event, is_summary

#: Text before the password of any URL: ``scheme://user:`` or ``scheme://:``.
_BEFORE_PASSWORD = re.compile(r"(?<=\w://)[^\s:/@]*:")
_BLANK = re.compile(r"\s")
#: A password as a parameter, which Redis URLs and connection strings allow too.
_SECRET_PARAMETER = re.compile(r"(password=)([^&\s]+)")
#: Credentials as HTTP clients print them.
_BEARER = re.compile(r"((?:Bearer|Basic) )([A-Za-z0-9._~+/=-]{8,})")
#: Environment variables of this service and of OpenTelemetry whose whole value is secret.
_SECRET_VARIABLE = re.compile(r"(JOBWORKER|OTEL)_\w*(KEY|TOKEN|PASSWORD|SECRET|HEADERS)")
#: Shorter secrets occur inside of ordinary words. In a URL they are redacted all the same.
_MIN_SECRET_CHARS = 6
#: Longest text of a field or message: a handler's longest error (`outcome.MAX_ERROR_CHARS`) fits.
MAX_TEXT_CHARS = 4096
#: Longest traceback: a few hundred frames.
MAX_TRACEBACK_CHARS = 32 * 1024
#: Most items of a list or mapping that are written.
MAX_ITEMS = 64
#: Most levels of lists and mappings in a field, and most lists and mappings in it.
MAX_DEPTH, MAX_CONTAINERS = 16, 256
#: Larger integers are written as text: no reader of JSON takes them as numbers.
_MAX_INT_BITS = 1024
#: Fields of each line that no ``extra`` may replace: readers trust them.
_OWN_FIELDS = frozenset({"timestamp", "level", "service", "role"})
_DROPPED = "log.dropped"
_EXCEPTION = "exception"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", _EXCEPTION}

#: The secrets of this process as one pattern; see `set_secrets`.
_secrets: re.Pattern[str] | None = None


def redacted(text: str) -> str:
    """Replace the passwords of all URLs in the text, and the secrets given to `set_secrets`.

    The time is linear in the length of the text, because every producer can get text into log lines.
    """
    if "://" in text:
        text = _without_passwords(text)
    text = _SECRET_PARAMETER.sub(r"\1***", text)
    text = _BEARER.sub(r"\1***", text)
    return _secrets.sub("***", text) if _secrets else text


def _without_passwords(text: str) -> str:
    parts, done = [], 0
    for start, end in _passwords(text):
        parts += [text[done:start], "***"]
        done = end
    return "".join([*parts, text[done:]])


def _passwords(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of the password of every URL.

    A password ends at the last ``@`` before white space, as clients read it: it may contain an ``@`` itself.
    Each word of the text is scanned once. One pattern for all of this would take quadratic time.
    """
    position = 0
    while prefix := _BEFORE_PASSWORD.search(text, position):
        start = prefix.end()
        blank = _BLANK.search(text, start)
        position = blank.start() if blank else len(text)
        end = text.rfind("@", start + 1, position)
        if end >= 0:
            yield start, end


def bounded(text: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """The text, or only its beginning and end if it is longer than ``max_chars``."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def set_secrets(secrets: Iterable[str]) -> None:
    """Redact these strings in every text from now on; replaces the strings of an earlier call."""
    global _secrets
    long_enough = [one for one in secrets if len(one) >= _MIN_SECRET_CHARS]
    # Also in the forms that they have inside of a quoted text.
    escaped = [json.dumps(one, ensure_ascii=ascii)[1:-1] for one in long_enough for ascii in (True, False)]
    forms = {*long_enough, *escaped, *(repr(one)[1:-1] for one in long_enough)}
    long_first = sorted(forms, key=len, reverse=True)
    _secrets = re.compile("|".join(map(re.escape, long_first))) if long_first else None


def secrets_of(settings: Settings, environment: Mapping[str, str]) -> set[str]:
    """Every password, key and token in the settings and the environment, as written and URL-decoded."""
    texts = [str(getattr(settings, name)) for name in settings.secret_urls]
    secrets = {text[start:end] for text in texts for start, end in _passwords(text)}
    secrets |= {match[2] for text in texts for match in _SECRET_PARAMETER.finditer(text)}
    for name in settings.secret_tokens:
        token = str(getattr(settings, name))
        secrets |= {token, token.partition(":")[2]}
    for name in environment:
        if _SECRET_VARIABLE.fullmatch(name):
            value = environment[name]
            # Headers are a list of name=value. A key or token is the whole value.
            secrets |= {value, *(part.partition("=")[2].strip() for part in value.split(","))}
    for name in settings.secret_files:
        if path := str(getattr(settings, name)):
            # A file of several secrets has one at the end of each line.
            text = _content(path)
            secrets |= {text, *(line.split()[-1] for line in text.splitlines() if line.strip())}
    return secrets | {unquote(secret) for secret in secrets if "%" in secret}


def _content(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").strip()
    except (OSError, ValueError):  # the role that needs it reports it
        return ""


class _FieldReader:
    """Turns a field into JSON types without secrets, bounded. A value that contains itself has an end."""

    def __init__(self) -> None:
        self._containers_left = MAX_CONTAINERS

    def read(self, value: Any) -> Any:
        """The field. It never raises, whatever a handler's own class does."""
        try:
            return self._read(value, 0)
        except Exception as error:
            return f"<{type(value).__name__}: cannot be read: {type(error).__name__}>"

    def _read(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            return value if value.bit_length() <= _MAX_INT_BITS else text_of(value)
        if not isinstance(value, Mapping | list | tuple):
            return _text(text_of(value))
        if depth == MAX_DEPTH or not self._containers_left:
            return "[... nested too deeply ...]"
        self._containers_left -= 1
        if isinstance(value, Mapping):
            items = islice(value.items(), MAX_ITEMS)
            return {_text(text_of(key)): self._read(one, depth + 1) for key, one in items}
        left_out = [f"[... {len(value) - MAX_ITEMS} items ...]"] if len(value) > MAX_ITEMS else []
        return [self._read(one, depth + 1) for one in value[:MAX_ITEMS]] + left_out


def _text(text: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """A text without secrets, then bounded: half a password would not be recognised."""
    return bounded(redacted(text), max_chars)


def _message(record: logging.LogRecord) -> str:
    """The message with its arguments filled in, or both beside the error if they do not fit."""
    try:
        message = record.getMessage()
    except Exception as error:
        trouble = f"{type(error).__name__}: {text_of(error)}"
        message = (
            f"{text_of(record.msg)} (arguments {_arguments(record.args)} cannot be filled in: {trouble})"
        )
    return _text(message)


def _arguments(args: object) -> str:
    """The arguments of a message; one that cannot be written does not hide the others."""
    if not isinstance(args, tuple):
        return text_of(args, repr)
    return f"({', '.join(text_of(one, repr) for one in args)})"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Fields of the running job, then the ``extra`` fields.

    An ``extra`` field that is named like a field of the line or of the running job gets a trailing
    underscore. The service's own lines may name another job.
    """
    extra = {text_of(key): value for key, value in vars(record).items() if key not in _STANDARD}
    from_service = text_of(record.name).partition(".")[0] == "jobworker"
    # The exporter of spans runs in a thread of its own: its lines are not about the running job.
    unrelated = (
        is_summary(record) or is_event(record, _DROPPED) or text_of(record.name).startswith("opentelemetry")
    )
    job_fields = {} if unrelated else current_log_fields()
    fields = {key: _FieldReader().read(value) for key, value in job_fields.items()}
    kept = _OWN_FIELDS if from_service else _OWN_FIELDS | fields.keys()
    for key, value in extra.items():
        field = _FieldReader().read(value)
        taken = key in kept and not (key in fields and fields[key] == field)
        fields[_text(key) + "_" * taken] = field
    return fields


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback of a record: of ``exc_info``, or as text in the ``extra`` field ``exception``, which
    comes from another process. Empty if there is none."""
    if not record.exc_info:
        text = vars(record).get(_EXCEPTION)
        return "" if text is None else _text(text_of(text), MAX_TRACEBACK_CHARS)
    try:
        text = formatter.formatException(record.exc_info)
    except Exception as error:  # a handler's own exception class may break any attribute
        text = f"{text_of(record.exc_info[0])} (the traceback cannot be formatted: {type(error).__name__})"
    return _text(text, MAX_TRACEBACK_CHARS)


class JsonFormatter(logging.Formatter):
    """JSON lines: ``timestamp``, ``level``, ``msg``, ``service``, ``role``, the running job, ``extra``."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object on one line, a traceback included."""
        event = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "msg": _message(record),
            "service": "jobworker",
            "role": self._role,
            **_fields(record),
        }
        if exception := _exception(self, record):
            event[_EXCEPTION] = exception
        return safe_json(event)


class TextFormatter(logging.Formatter):
    """Text lines: ``12:00:01 warning reader: lease.lost entries=3``, with the date if asked for."""

    def __init__(self, role: str, *, with_date: bool = False) -> None:
        super().__init__()
        self._role = role
        self._clock_format = "%Y-%m-%d %H:%M:%S" if with_date else "%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        """One line, followed by the indented traceback if there is one. No field can start a line."""
        clock = datetime.fromtimestamp(record.created).strftime(self._clock_format)
        line = f"{clock} {record.levelname.lower():7} {self._role}: {_message(record)}"
        lines = [" ".join([line, *(f"{key}={value}" for key, value in _fields(record).items())])]
        if exception := _exception(self, record):
            lines += ["    " + trace_line for trace_line in exception.split("\n")]
        return "\n".join(map(escape_control, lines))


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Rate-limited stderr handler that neither blocks nor raises: the log must not stop the roles.

    A stream without a descriptor, as tests and notebooks have it, is written directly.
    """

    def __init__(self, max_lines: int) -> None:
        super().__init__(sys.stderr)
        self._max_lines = max_lines
        self._rate_limit = RateLimitFilter(self._emit_unfiltered, max_lines=max_lines)
        self.addFilter(self._rate_limit)
        self._encoding = str(getattr(sys.stderr, "encoding", None) or "utf-8")
        self._writer = self._open_writer()

    def is_as_new(self, max_lines: int) -> bool:
        """Whether a new one would be the same: it has written no line, also not before a fork."""
        is_unused = self._writer is not None and self._writer.is_unused
        return is_unused and self.stream is sys.stderr and self._max_lines == max_lines

    def _open_writer(self) -> LineWriter | None:
        try:
            fd = sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):  # closed before the start, or in memory
            return None
        line_writer.log_writer = LineWriter(partial(write_all, fd), self._notice)
        return line_writer.log_writer

    def _notice(self, lines: int) -> bytes:
        fields = {"name": "jobworker", "msg": _DROPPED, "lines": lines}
        level = {"levelno": logging.WARNING, "levelname": "WARNING"}
        return self._encoded(logging.makeLogRecord({**fields, **level}))

    def _encoded(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + self.terminator).encode(self._encoding, "backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or leave it to the thread of the line writer if stderr blocks."""
        if self._writer is None:
            super().emit(record)
            return
        try:
            self._writer.put(self._encoded(record))
        except Exception:  # as in StreamHandler.emit
            self.handleError(record)

    def _emit_unfiltered(self, record: logging.LogRecord) -> None:
        self.acquire()
        try:
            self.emit(record)
        finally:
            self.release()

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line."""

    def flush(self) -> None:
        """Nothing is buffered but what blocks; `close` waits for that."""
        if self._writer is None:
            super().flush()

    def close(self) -> None:
        """Emit a log.suppressed line for each suppressed event, and wait briefly for lines that wait."""
        self._rate_limit.close()
        if self._writer is not None:
            self._writer.flush()
        super().close()


def configure(role: str, settings: Settings, environment: Mapping[str, str]) -> None:
    """Set up logging of a process of the service, before anything else.

    Warnings and the exception that ends the process become log events too. Secrets are redacted in all of
    them.
    """
    set_secrets(secrets_of(settings, environment))
    set_up(role, settings.log_level, settings.log_format, settings.log_limit)
    logging.captureWarnings(True)
    sys.excepthook = _log_crash
    threading.excepthook = _log_thread_crash


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("jobworker").critical("process.crashed", exc_info=(kind, error, trace))


def _log_thread_crash(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _log_crash(args.exc_type, args.exc_value, args.exc_traceback)


def set_up(role: str, level: str, form: str, max_lines: int = DEFAULT_MAX_LINES) -> None:
    """Send the lines of every logger to stderr. ``form`` is ``json`` or ``text``.

    ``max_lines`` is that of the log rate limiter.
    """
    root = logging.getLogger()
    # A child of the forkserver keeps its unused handler: a new one would copy more shared pages (0.2 MB).
    unused = [one for one in root.handlers if isinstance(one, _StderrHandler) and one.is_as_new(max_lines)]
    handler = unused[0] if unused else _StderrHandler(max_lines)
    on_terminal = bool(sys.stderr and sys.stderr.isatty())
    text_formatter = TextFormatter(role, with_date=not on_terminal)
    handler.setFormatter(JsonFormatter(role) if form == "json" else text_formatter)
    root.handlers[:] = [handler]
    _set_level(root, logging.getLevelNamesMapping()[level.upper()])
    # Libraries log details at INFO that no operator needs.
    for noisy in ("httpx", "sentence_transformers", "urllib3"):
        _set_level(logging.getLogger(noisy), logging.ERROR)


def _set_level(logger: logging.Logger, level: int) -> None:
    # A new level writes to every logger, so a child of the forkserver copies their pages (0.3 MB).
    if logger.level != level:
        logger.setLevel(level)
