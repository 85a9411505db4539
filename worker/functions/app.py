"""App modules of ``--app``: which job types they have, without importing them in this process."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import orjson

from ..errors import ConfigurationError

#: Longest import of the app's modules, also with torch on a slow disk.
_IMPORT_WITHIN_S = 60.0
#: A file of this size names a hundred thousand modules.
_MAX_LISTING_BYTES = 16 * 1024 * 1024
_DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")


class AppListing(msgspec.Struct):
    """What importing the app's modules has found.

    ``handlers``: (type, ``module:name``) pairs. ``untyped``: handler classes without ``job_type``.
    ``errors``: for the user, each with the option that it is about. ``files``: source files of all modules
    that were loaded, without installed ones.
    """

    handlers: list[tuple[str, str]] = []
    untyped: list[str] = []
    errors: list[str] = []
    files: list[str] = []


def parse_app(text: str) -> str:
    """``module`` or ``package.module`` of ``--app``. Raises `ConfigurationError`."""
    name = text.strip()
    if not _DOTTED.fullmatch(name) or name.endswith(".py"):
        hint = name.removesuffix(".py").replace("/", ".").strip(".")
        hint = hint if _DOTTED.fullmatch(hint) else "mypkg.jobs"
        raise ConfigurationError(f"--app {text!r}: say the name of a module, for example {hint}")
    return name


def app_handlers(apps: Sequence[str], builtin: Iterable[str], given: Mapping[str, str]) -> dict[str, str]:
    """The handlers of the app's modules: type -> ``module:name``. It imports them in another process.

    ``builtin``: types that the service has already; ``given``: handlers of ``--handler``. Raises
    `ConfigurationError` if a module cannot be imported or has no handler, and where a type has two.
    """
    listing = list_app(apps)
    return checked_handlers(listing, builtin, given)


def checked_handlers(listing: AppListing, builtin: Iterable[str], given: Mapping[str, str]) -> dict[str, str]:
    """As `app_handlers`, of a listing that was made before."""
    builtin = set(builtin)
    errors = list(listing.errors)
    found: dict[str, str] = {}
    for job_type, target in listing.handlers:
        other = found.setdefault(job_type, target)
        if other != target:
            errors.append(f"--app: type {job_type} has two handlers: {other} and {target}")
        elif (chosen := given.get(job_type, target)) != target:
            errors.append(f"--app: type {job_type} has two handlers: {target} and --handler {chosen}")
        elif job_type in builtin and job_type not in given:
            errors.append(
                f"--app: type {job_type} of {target} is a built-in type: choose another, give "
                f"--no-builtin-handlers, or replace it by --handler {job_type}={target}"
            )
    errors += [
        f'--app: class {target} has no type: set job_type = "..." in it, or give --handler TYPE={target}'
        for target in listing.untyped
        if target not in given.values()
    ]
    if errors:
        raise ConfigurationError("\n".join(errors))
    return found


def list_app(apps: Sequence[str], others: Sequence[str] = ()) -> AppListing:
    """Import modules in another process and list their handlers; ``others`` for their files only.

    Raises `ConfigurationError` if that process has no answer within a minute.
    """
    with open(os.memfd_create("app"), "rb", buffering=0) as answer:
        command = listing_command(apps, others, answer.fileno())
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, pass_fds=[answer.fileno()], check=False,
                timeout=_IMPORT_WITHIN_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            named = ", ".join([*apps, *others])
            raise ConfigurationError(
                f"--app: importing {named} takes longer than {_IMPORT_WITHIN_S:.0f} s"
            ) from None
        code = done.returncode
        return read_listing(answer.fileno(), f"signal {-code}" if code < 0 else f"exit {code}")


def listing_command(apps: Sequence[str], others: Sequence[str], fd: int) -> list[str]:
    """The command that writes an `AppListing` to a descriptor; it ends with this process."""
    tied = [sys.executable, "-P", "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]
    return [
        *tied, sys.executable, "-P", "-m", "jobworker.worker.functions.app_listing", str(fd),
        orjson.dumps([*apps]).decode(), orjson.dumps([*others]).decode(),
    ]  # fmt: skip


def read_listing(fd: int, cause: str) -> AppListing:
    """What the command has written. Raises `ConfigurationError` with ``cause`` if it has ended before."""
    try:
        return msgspec.json.decode(os.pread(fd, _MAX_LISTING_BYTES, 0), type=AppListing)
    except msgspec.DecodeError:
        raise ConfigurationError(f"--app: the process that imports it has ended: {cause}") from None
