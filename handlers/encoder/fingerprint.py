"""Fingerprint of a model's folder: a hash over every byte of every file.

A model of 2 GB takes seconds to read. The hash of each file is kept with its stat data in the cache folder.
The next process reads only files that changed. A file that changed within the last `SETTLED_S` is read each
time: a second change in the same tick of the clock would have the same stat data.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from .cache_folders import cache_folders

# Coarser than the timestamps of every file system in use (FAT: 2 s).
SETTLED_S = 3.0
_DIGEST_BYTES = 16
_ATTEMPTS = 3


class FilesChanging(Exception):
    """A file of the model changed while it was read."""


class _FileHash(msgspec.Struct, frozen=True):
    #: Device, inode, size, and the nanoseconds of the last change of content and of metadata.
    stat: tuple[int, int, int, int, int]
    digest: str


_Hashes = dict[str, _FileHash]


def fingerprint(folder: Path) -> str:
    """Hash of 16 hex digits over names and contents of all files. Raises OSError or FilesChanging."""
    kept = _read_kept(folder)
    hashes = {name: _hash_file(path, kept.get(name)) for name, path in _files(folder)}
    if hashes != kept:
        _keep(folder, hashes)
    whole = hashlib.blake2b(digest_size=8)
    for name, file in sorted(hashes.items()):
        whole.update(f"{len(name)}:{name}{file.digest}".encode(errors="surrogateescape"))
    return whole.hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative name and path of every regular file, also behind links to folders; each folder once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        identity = os.stat(root)
        if (identity.st_dev, identity.st_ino) in seen:
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders.sort()
        for name in names:
            path = Path(root, name)
            if path.is_file():
                yield str(path.relative_to(folder)), path


def _hash_file(path: Path, kept: _FileHash | None) -> _FileHash:
    for _ in range(_ATTEMPTS):
        before = _stat(path)
        if kept is not None and kept.stat == before:
            return kept
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).hexdigest()
        if _stat(path) == before:
            return _FileHash(before, digest)
    raise FilesChanging(f"{path} is being written: start again when it is complete")


def _stat(path: Path) -> tuple[int, int, int, int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


# ---- hashes of earlier processes


def _record(root: Path, folder: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=_DIGEST_BYTES).hexdigest()
    return root / f"{name}.files.json"


def _read_kept(folder: Path) -> _Hashes:
    for root in cache_folders():
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(_record(root, folder).read_bytes(), type=_Hashes)
    return {}


def _keep(folder: Path, hashes: _Hashes) -> None:
    """Write the hashes of settled files to the first writable cache folder; without one, nothing is kept."""
    latest_ns = time.time_ns() - int(SETTLED_S * 1e9)
    settled = {name: file for name, file in hashes.items() if max(file.stat[3:]) < latest_ns}
    for root in cache_folders():
        with contextlib.suppress(OSError, UnicodeError):
            root.mkdir(parents=True, exist_ok=True)
            _replace(_record(root, folder), msgspec.json.encode(settled))
            return


def _replace(path: Path, content: bytes) -> None:
    descriptor, part = tempfile.mkstemp(prefix=f"{path.name}.part-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            # For a service that runs as another user.
            os.fchmod(file.fileno(), 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
