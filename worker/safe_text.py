"""Text of producers and handlers, made safe for log lines and terminals: no control characters."""

# orjson refuses integers beyond 64 bits and unpaired surrogates, which log lines and tools show all the same.
import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
import orjson

#: Characters that start a new line, move a terminal's cursor, change its title or reverse text: C0 and C1
#: controls, line separators and the bidirectional controls of Unicode (UAX #9). Also surrogates, which no
#: terminal can encode. Producers choose job ids, and error texts quote payloads.
CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

#: What the standard library gives to ``default``, orjson gives to it too.
_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME


def escape_control(text: str) -> str:
    r"""The text with each control character as an escape of JSON and Python: ``\n``, ``\u001b``."""
    return CONTROL.sub(_escape, text)


def text_of(value: object, convert: Callable[[object], str] = str) -> str:
    """``str(value)``; a short stand-in if that raises, as a handler's own class may do. It never raises."""
    try:
        return convert(value)
    except Exception as error:
        if isinstance(value, int):  # Python refuses to write more than 4,300 digits
            return f"<int of {value.bit_length()} bits>"
        return f"<{type(value).__name__}: its text raised {type(error).__name__}>"


def is_unicode(text: str) -> bool:
    """Whether the text has no unpaired surrogate, so that UTF-8 can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def safe_json(value: Any, default: Callable[[Any], Any] | None = None, *, indent: bool = False) -> str:
    """JSON that is readable in every language and safe on a terminal. It decodes to the same value.

    NaN and infinities become null. ``default`` is that of `json.dumps`; with ``indent`` the text has lines.
    An `orjson.Fragment` in the value must be JSON without line breaks.
    """

    def other(item: Any) -> Any:
        if isinstance(item, tuple):  # a named one: orjson takes plain ones only
            return list(item)
        if default is None:
            raise TypeError(f"{type(item).__name__} is no JSON")
        return default(item)

    try:
        data = orjson.dumps(value, other, _OPTIONS | (orjson.OPT_INDENT_2 if indent else 0))
        text = data.decode("utf-8", "replace")  # a fragment may hold any bytes
    except orjson.JSONEncodeError:
        text = _any_json(value, other, indent)
    # Control characters are in strings only, where an escape has the same meaning.
    return "\n".join(map(escape_control, text.split("\n"))) if indent else escape_control(text)


def _any_json(value: Any, default: Callable[[Any], Any], indent: bool) -> str:
    """The same with everything that orjson refuses."""

    def other(item: Any) -> Any:
        if isinstance(item, orjson.Fragment):
            return msgspec.json.decode(orjson.dumps(item))
        return default(item)

    separators = (",", ": " if indent else ":")
    text = json.dumps(
        value, ensure_ascii=False, default=other, indent=2 if indent else None, separators=separators
    )
    if "NaN" not in text and "Infinity" not in text:
        return text
    finite = json.loads(text, parse_constant=lambda _: None)
    return json.dumps(finite, ensure_ascii=False, indent=2 if indent else None, separators=separators)


def _escape(match: re.Match[str]) -> str:
    return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(match[0], f"\\u{ord(match[0]):04x}")
