"""Bearer tokens of HTTP clients: the file that lists them, and which tenant and project a token is for."""

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigurationError

#: A shorter token could be guessed: nothing limits the tries of a client.
MIN_TOKEN_CHARS = 16
#: Largest file that is read: ten thousand tenants.
_MAX_BYTES = 4 * 1024 * 1024
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)
#: What a header can carry.
_TOKEN = re.compile(r"[!-~]+", re.ASCII)
_OPTION = "--serve-token-file"


class TokenHolder(NamedTuple):
    """Owner of a valid token. ``tenant`` is empty if the token is for all tenants, ``project`` if it is for
    all projects of the tenant."""

    tenant: str
    project: str = ""


class BearerTokens:
    """Tokens by their hash, so that the time of a look-up tells nothing about a token."""

    def __init__(self, holders: Mapping[bytes, TokenHolder]) -> None:
        self._holders = dict(holders)

    def holder(self, authorization: str) -> TokenHolder | None:
        """The owner of the token in an Authorization header; None if it is missing or unknown."""
        scheme, _, token = authorization.strip().partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self._holders.get(_digest(token.strip()))


def read_tokens(path: str) -> BearerTokens:
    """Tokens of a file: ``TOKEN``, ``TENANT TOKEN`` or ``TENANT/PROJECT TOKEN`` a line; empty lines and lines
    with # are skipped.

    Raises `ConfigurationError` for a file that other users may read or write, and for a wrong line, which it
    names by its number only.
    """
    holders: dict[bytes, TokenHolder] = {}
    for number, line in enumerate(_read_private(Path(path)).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        token = words[-1]
        holder = TokenHolder("") if len(words) == 1 else TokenHolder(*words[0].split("/", 1))
        names = words[0].split("/") if len(words) == 2 else []
        if len(words) > 2 or len(names) > 2 or not all(map(_ID.fullmatch, names)):
            raise ConfigurationError(
                f"{_OPTION} {path}, line {number}: say TOKEN, TENANT TOKEN or TENANT/PROJECT TOKEN"
            )
        if len(token) < MIN_TOKEN_CHARS or not _TOKEN.fullmatch(token):
            raise ConfigurationError(
                f"{_OPTION} {path}, line {number}: a token has {MIN_TOKEN_CHARS} or more printable ASCII "
                "characters; make one with: openssl rand -hex 24"
            )
        if holders.setdefault(_digest(token), holder) != holder:
            raise ConfigurationError(f"{_OPTION} {path}, line {number}: this token has two owners")
    if not holders:
        raise ConfigurationError(f"{_OPTION} {path}: the file holds no token")
    return BearerTokens(holders)


def _read_private(path: Path) -> str:
    """The text of a file of this user or root that others may not read."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
                raise ConfigurationError(f"{_OPTION} {path}: must be a regular file of this user or of root")
            if found.st_mode & (stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP):
                raise ConfigurationError(
                    f"{_OPTION} {path}: other users may read or change it: run chmod 600 {path}"
                )
            return file.read(_MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{_OPTION} {path}: cannot be read: {error}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    """Without O_NONBLOCK, a pipe in place of the file would block for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
