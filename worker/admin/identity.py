"""Id, type, tenant and counters of a job, read from its bytes as far as they are valid."""

# orjson reads no member of a job whose end cannot be read.
import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from ..envelope import LAST_ERROR_FIELD, MAX_NAME_CHARS

_NAMES = ("id", "type", "tenant_id", "project_id")
#: Bytes of a malformed job in which its names are searched. Producers write them first.
_PREFIX_BYTES = 64 * 1024
_BLANKS = re.compile(r"[ \t\n\r]*")
#: Half a surrogate pair, or bytes that are not UTF-8: such a name was not sent.
_NO_NAME = re.compile(r"[\ud800-\udfff\ufffd]")


class _Names(msgspec.Struct):
    id: str = ""
    type: str = ""
    tenant_id: str = ""
    project_id: str = ""


class JobIdentity(_Names):
    """What names a job, and how often it was tried. The rest of the job may be invalid."""

    retry_count: int = 0
    deaths: int = 0
    #: Error of the last try, for a job that is tried again.
    last_error: str = msgspec.field(default="", name=LAST_ERROR_FIELD)

    @property
    def is_delayed(self) -> bool:
        """For a job in the retry set: whether it waits for its first try, not for another one."""
        return not (self.retry_count or self.deaths or self.last_error)


_identity = msgspec.json.Decoder(JobIdentity)
_names = msgspec.json.Decoder(_Names)


def read_identity(data: bytes | None) -> JobIdentity:
    """The identity in a job's JSON. Fields are empty where the data is not a job; it never raises.

    Invalid counters do not hide the names: a dead letter with such a job can still be found and requeued.
    """
    try:
        return _identity.decode(data or b"")
    except (ValueError, RecursionError):
        pass
    try:
        return JobIdentity(**msgspec.structs.asdict(_names.decode(data or b"")))
    except (ValueError, RecursionError):
        return JobIdentity()


def read_malformed_identity(data: bytes) -> JobIdentity:
    """The names that a malformed, and perhaps truncated, job states before the place where it cannot be read.

    A name of the wrong kind or length is empty, and so is one that is given twice. It never raises.
    """
    names: dict[str, str] = {}
    repeated = set()
    text = data[:_PREFIX_BYTES].decode(errors="replace")
    try:
        for key, value in _members(text):
            if key in names:
                repeated.add(key)
            if key in _NAMES and _is_name(value):
                names[key] = value
    except (ValueError, RecursionError):  # the rest cannot be read
        pass
    id, type, tenant_id, project_id = ("" if one in repeated else names.get(one, "") for one in _NAMES)
    return JobIdentity(id, type, tenant_id, project_id)


def _members(text: str) -> Iterator[tuple[str, Any]]:
    """The members of a JSON object, one by one. Raises ValueError or RecursionError where it is invalid."""
    end = _expect(text, 0, "{")
    while True:
        key, end = _decode_value(text, _skip(text, end))
        if not isinstance(key, str):
            raise ValueError("a key that is no text")
        value, end = _decode_value(text, _skip(text, _expect(text, end, ":")))
        yield key, value
        end = _expect(text, end, ",")


_decode_value = json.JSONDecoder().raw_decode


def _skip(text: str, start: int) -> int:
    blanks = _BLANKS.match(text, start)
    return blanks.end() if blanks else start


def _expect(text: str, start: int, token: str) -> int:
    """The end of a token behind blanks. Raises ValueError if something else is there."""
    start = _skip(text, start)
    if not text.startswith(token, start):
        raise ValueError(token)
    return start + len(token)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS and not _NO_NAME.search(value)
