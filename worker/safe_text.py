"""Text of producers and handlers, made safe for log lines and terminals: no control characters."""

import json
import re
from collections.abc import Callable
from typing import Any

#: Characters that start a new line, move a terminal's cursor, change its title or reverse text: C0 and C1
#: controls, line separators and the bidirectional controls of Unicode (UAX #9). Also surrogates, which no
#: terminal can encode. Producers choose job ids, and error texts quote payloads.
CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def escape_control(text: str) -> str:
    r"""The text with each control character as an escape of JSON and Python: ``\n``, ``\u001b``."""
    return CONTROL.sub(_escape, text)


def safe_json(value: Any, default: Callable[[Any], Any] | None = None, indent: int | None = None) -> str:
    """JSON that is readable in every language and safe on a terminal. It decodes to the same value.

    ``default`` and ``indent`` are those of `json.dumps`; the line breaks of ``indent`` are kept.
    """
    lines = json.dumps(value, ensure_ascii=False, default=default, indent=indent).split("\n")
    # Control characters are in strings only, where an escape has the same meaning.
    return "\n".join(map(escape_control, lines))


def _escape(match: re.Match[str]) -> str:
    return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(match[0], f"\\u{ord(match[0]):04x}")
