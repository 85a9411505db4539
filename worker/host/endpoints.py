"""Addresses of the service on this machine: the file ``endpoints.json`` in its data directory.

The supervisor writes the file when its stores are up. It holds passwords and has mode 0600.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from ..errors import ConfigurationError

FILE_NAME = "endpoints.json"
DEFAULT_DATA_DIR = "./jobworker-data"
#: Environment variables of the service and of its clients.
REDIS_URL_VARIABLE = "JOBWORKER_REDIS_URL"
DATA_DIR_VARIABLE = "JOBWORKER_DATA_DIR"
STREAM_VARIABLE = "JOBWORKER_STREAM"
#: Largest file that is read: ours has some hundred bytes.
_MAX_BYTES = 64 * 1024


def store_url(environment: Mapping[str, str] = os.environ) -> str:
    """URL of the job store for a program that names none; it may hold a password.

    ``JOBWORKER_REDIS_URL`` wins; else the service of ``JOBWORKER_DATA_DIR`` (``./jobworker-data``) is used.
    Raises `ConfigurationError` if neither names a store, or if a variable is set and empty.
    """
    if given := _filled(environment, REDIS_URL_VARIABLE):
        return given
    named = _filled(environment, DATA_DIR_VARIABLE)
    data_dir = named or DEFAULT_DATA_DIR
    url = read_endpoints(data_dir).get("redis_url")
    if not isinstance(url, str) or not url:
        raise ConfigurationError(
            f"no job store: {REDIS_URL_VARIABLE} is not set and no service has run in "
            f"{Path(data_dir).absolute()}. Give the URL, or set {REDIS_URL_VARIABLE}, or {DATA_DIR_VARIABLE} "
            "to the --data-dir of a service on this machine"
        )
    return url


def _filled(environment: Mapping[str, str], variable: str) -> str:
    """The value; empty if it is not set. A secret that was not filled in must not select another store."""
    value = environment.get(variable)
    if value is not None and not value.strip():
        raise ConfigurationError(f"{variable} is set and empty: give it a value, or unset it")
    return value or ""


def only_stream(environment: Mapping[str, str] = os.environ) -> str:
    """The stream that ``JOBWORKER_STREAM`` names; empty if it is not set or names several. Raises
    `ConfigurationError` if it is set and empty."""
    names = [text.rpartition("=")[0] or text for text in _filled(environment, STREAM_VARIABLE).split()]
    return names[0] if len(names) == 1 else ""


def read_endpoints(data_dir: str) -> dict[str, Any]:
    """The fields of the file in a data directory; empty if no service has run there. Never waits, creates or
    changes anything.

    Raises `ConfigurationError` for a file that this user may not read, or that someone else could have
    written: it decides where jobs and passwords are sent. The service of a folder that the user named may run
    as another user. That of the default folder may not: any user who may write into the current folder could
    have put it there.
    """
    path = Path(data_dir, FILE_NAME)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}): run this as the user of its service, or give "
            f"--redis-url (or {REDIS_URL_VARIABLE})"
        ) from None
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        is_plain = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o022
        is_named = data_dir != DEFAULT_DATA_DIR
        if not is_plain or not (is_named or status.st_uid in (0, os.geteuid())):
            raise ConfigurationError(
                f"{path}: another user could have written it. Give --redis-url (or {REDIS_URL_VARIABLE}), or "
                "remove the file"
            )
        return parse_endpoints(file.read(_MAX_BYTES))


def parse_endpoints(data: bytes) -> dict[str, Any]:
    """The fields of the file's content; empty if it is not a JSON object."""
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
