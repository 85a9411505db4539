"""The data directory of a service: its lock, and where its embedded servers listen."""

import errno
import fcntl
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from ..errors import ConfigurationError
from .endpoints import FILE_NAME, parse_endpoints

#: Embedded servers listen on this address, for tools, and on Unix sockets, for the service.
HOST = "127.0.0.1"
#: The kernel's limit is 107 bytes.
_MAX_SOCKET_PATH = 100
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]+")


class DataDir:
    """The service's own folder, locked while it is held. Private to its user: it holds secrets."""

    def __init__(self, path: str) -> None:
        self.path = safe_folder(Path(path).resolve())
        self.endpoints_file = self.path / FILE_NAME
        self.lock_fd = open_own(self.path / "lock", os.O_RDWR | os.O_CREAT)

    def lock(self) -> bool:
        """Try to hold the folder; False while another service (or a store of one) holds it."""
        try:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        pid = str(os.getpid()).encode()
        os.pwrite(self.lock_fd, pid, 0)
        os.ftruncate(self.lock_fd, len(pid))
        return True

    def holder_pid(self) -> int:
        """Process id of the service that locked the folder last; 0 if the file does not say."""
        text = os.pread(self.lock_fd, 20, 0)
        return int(text) if text.isdigit() else 0

    def endpoints(self) -> dict[str, Any]:
        """Where the service of this folder listens (or last listened); empty where none ever ran."""
        return parse_endpoints(read_own(self.endpoints_file) or b"null")

    def announce(self, endpoints: dict[str, Any]) -> None:
        """Write where everything listens, for tools on this machine; readable by its user only."""
        write_private(self.endpoints_file, orjson.dumps(endpoints).decode())

    def is_in_place(self) -> bool:
        """Whether the folder has its name and its lock file still: it may be deleted, renamed or replaced."""
        try:
            named = os.stat(self.path / "lock", follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(named, os.fstat(self.lock_fd))

    def close(self) -> None:
        """Let go of the lock (stores that still run keep it)."""
        os.close(self.lock_fd)


def write_private(path: Path, text: str) -> None:
    """Replace the file in one step by one that only its user can read."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    # As bytes: the name of a folder may have bytes that are no UTF-8.
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(os.fsencode(text))
    draft.replace(path)


def kept_secret(path: Path, user: str = "") -> str:
    """The secret of this data directory, made at its first use; behind ``user:`` where a name is given.

    An empty file counts as none: a crash of the host can leave one.
    """
    kept = (read_own(path, mode=0o600) or b"").decode("utf-8", "replace").strip()
    if not kept:
        kept = f"{user}:{secrets.token_urlsafe(24)}" if user else secrets.token_urlsafe(24)
        write_private(path, kept)
    return kept


def private_folder(path: Path) -> Path:
    """The folder, made if need be, for its user only, also where a copy has lost its mode.

    Raises `ConfigurationError` if it, or something in it, belongs to another user or is a symbolic link.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    _require_own(path, path.lstat(), stat.S_ISDIR)
    path.chmod(0o700)
    for inside in path.iterdir():
        found = inside.lstat()
        _require_own(inside, found, stat.S_ISDIR if stat.S_ISDIR(found.st_mode) else _is_file_or_socket)
    return path


def safe_folder(path: Path) -> Path:
    """The folder, made if need be for its user only.

    Raises `ConfigurationError` if other users own it or something in it, if they may write to it, or if it
    cannot be made. Symbolic links of this user are fine here: the archive may be on another disk.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.stat()
    except FileExistsError as error:
        raise ConfigurationError(f"data directory {path} is not a folder") from error
    except OSError as error:
        raise ConfigurationError(
            f"data directory {path} cannot be used: {error.strerror or error}"
        ) from error
    _require_own(path, found, stat.S_ISDIR)
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(
            f"other users may write to data directory {path}: run chmod go-w on it, or give a folder below it"
        )
    with suppress(PermissionError):
        for inside in path.iterdir():
            _require_owner(inside, inside.lstat())
    return path


def read_own(path: Path, mode: int = 0) -> bytes | None:
    """The content of a file, or None if there is none; ``mode``, if given, is restored.

    Raises `ConfigurationError` if another user owns it, or if it is a symbolic link or no regular file.
    """
    try:
        fd = open_own(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        if mode:
            os.fchmod(fd, mode)  # a copied data directory may have lost its modes
        return file.read()


def open_own(path: Path, flags: int) -> int:
    """Open a regular file of this user (or of root), and follow no symbolic link. A new file has mode 0600.

    Raises `ConfigurationError` for any other file, OSError as `os.open` does.
    """
    try:
        # Without O_NONBLOCK, a pipe in its place would block for ever.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise ConfigurationError(f"{path} is a symbolic link or no regular file: remove it") from error
        raise
    try:
        _require_own(path, os.fstat(fd), stat.S_ISREG)
    except ConfigurationError:
        os.close(fd)
        raise
    return fd


def _require_own(path: Path, found: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    """Raises `ConfigurationError` for a link, another kind of file, or another user's."""
    if stat.S_ISLNK(found.st_mode) or not is_kind(found.st_mode):
        raise ConfigurationError(f"{path} is a symbolic link or of an unexpected kind: remove it")
    _require_owner(path, found)


def _require_owner(path: Path, found: os.stat_result) -> None:
    """Raises `ConfigurationError` unless it is this user's or root's, from whom nothing protects."""
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigurationError(
            f"{path} belongs to another user (uid {found.st_uid}): run as that user, "
            "or give another --data-dir"
        )


def _is_file_or_socket(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def socket_path(folder: Path, name: str) -> str:
    """Path of a Unix socket in a private folder, for the service and its children while the service runs.

    A long path does not fit into a socket's address, and URLs and gRPC give some characters a meaning. The
    path then leads through a descriptor of this process.
    """
    path = str(folder / name)
    if len(path) <= _MAX_SOCKET_PATH and _PLAIN_PATH.fullmatch(path):
        return path
    return f"/proc/{os.getpid()}/fd/{os.open(folder, os.O_PATH | os.O_CLOEXEC)}/{name}"


def free_port(last_url: str | None) -> int:
    """The port of the last run where it is free, so that clients' settings stay good; else any free one."""
    last = (last_url or "").rpartition(":")[2].partition("/")[0]
    for port in (int(last) if last.isdigit() else 0, 0):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((HOST, port))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise ConfigurationError(f"no free port on {HOST}")
