"""Newer commands of the job store: each is used where the server has it, and none is required.

Valkey has none of them: it counts its versions differently and is recognised by its own field in INFO.
"""

import re
from typing import NamedTuple

from redis.exceptions import NoPermissionError

from .connect import Connection

_VERSION = re.compile(rb"^redis_version:(\d+)\.(\d+)", re.MULTILINE)


class Features(NamedTuple):
    """Which newer commands a server has."""

    #: XADD with IDMP, from Redis 8.6: an entry that is sent again after a lost answer is not added twice.
    idempotent_add: bool = False
    #: XREADGROUP with MAXSIZE, from Redis 8.10: the server limits the bytes of an answer.
    sized_reads: bool = False

    @property
    def names(self) -> list[str]:
        """The commands in words, for operators."""
        return ["XADD IDMP"] * self.idempotent_add + ["XREADGROUP MAXSIZE"] * self.sized_reads


def features_of(info: bytes) -> Features:
    """The features by the answer of INFO SERVER; none if it is empty."""
    found = _VERSION.search(info)
    if found is None or b"valkey_version:" in info:
        return Features()
    version = int(found[1]), int(found[2])
    return Features(idempotent_add=version >= (8, 6), sized_reads=version >= (8, 10))


def server_info(connection: Connection) -> bytes | None:
    """The answer of INFO SERVER on an open connection; None if this user may not run it."""
    connection.send_command("INFO", "server")
    try:
        return bytes(connection.read_response(disable_decoding=True))
    except NoPermissionError:
        return None
