"""A book as an open file: its identity, its batch, and the lines of it that are left out."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from jobworker.worker import BatchFinished, ConfigurationError, NewJob, OpenBatch, Producer
from jobworker.worker.extension import extension

from .importer import ImportStopped
from .jobs import JOB_TYPE, RejectedLine, Target, digest_head
from .lines import LineRead, read_json_lines, read_text

_CHUNK_BYTES = 1024 * 1024
#: Left-out lines that are printed, and that the report names.
_SHOWN_LINES, _NAMED_LINES = 20, 1000
#: Imports of the same content for which ids of batches are tried.
_MAX_REPEATS = 1000


class BookFile:
    """The bytes of a book, which can be read again. ``digest`` tells books and targets apart."""

    def __init__(self, name: str, file: BinaryIO, target: Target, *, plain_text: bool) -> None:
        self.name, self._file, self._plain_text = name, file, plain_text
        self._stat = self._read_stat()
        self.size = self._stat[0]
        head = digest_head(target, plain_text=plain_text)
        found = hashlib.blake2b(head, digest_size=8)
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
        self.digest = found.hexdigest()

    def reads(self) -> Iterator[LineRead]:
        """Chapters, rows and faults, from the start."""
        self._file.seek(0)
        return read_text(self._file) if self._plain_text else read_json_lines(self._file)

    def check_unchanged(self) -> None:
        """Raises `ImportStopped` if the file was changed since it was opened."""
        if self._read_stat() != self._stat:
            raise ImportStopped(f"{self.name} was changed while it was read: import it again")

    def open_batch(self, producer: Producer, target: Target, id: str, on_complete: str) -> OpenBatch:
        """The batch of this book that has not finished, else a new one.

        Raises `ConfigurationError` if the batch of that id belongs to another book or has finished.
        """
        name = f"import of {Path(self.name).name:.80} ({self.digest})"
        callback = NewJob(on_complete) if on_complete else None
        stream = extension().stream_of_type[JOB_TYPE]
        for number in range(1, _MAX_REPEATS):
            chosen = id or f"import-{self.digest}{f'-{number}' if number > 1 else ''}"
            try:
                batch = producer.batch(
                    target.tenant_id, on_complete=callback, name=name, id=chosen, stream=stream
                )
            except BatchFinished as error:
                if id:
                    raise ConfigurationError(str(error)) from error
                continue
            if not batch.counts().name.endswith(f"({self.digest})"):
                raise ConfigurationError(
                    f"batch {chosen} belongs to another file or to other options: give another --batch"
                )
            return batch
        raise ConfigurationError("the book was imported too often lately: give a --batch of your own")

    def _read_stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns


@contextmanager
def open_book(path: str, target: Target, stdin: Callable[[], BinaryIO] | None = None) -> Iterator[BookFile]:
    """Open a book. With the path ``-``, what `stdin` gives is copied to a temporary file first, so
    that it can be read again.

    Raises `ConfigurationError` if another import of the file runs on this machine.
    """
    if path == "-" and stdin is not None:
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(stdin(), copy, _CHUNK_BYTES)
            copy.seek(0)
            yield BookFile("standard input", copy, target, plain_text=False)
        return
    with open(path, "rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"another import of {path} runs") from None
        except OSError:
            pass  # a file system without locks
        yield BookFile(path, file, target, plain_text=path.lower().endswith(".txt"))


class Rejects:
    """Lines that are left out: printed by `echo`, counted, and written to a file if one is given."""

    def __init__(self, path: str | None, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self._file = open(path, "wb") if path else None  # noqa: SIM115  (__exit__ closes it)
        self.count = 0
        self.first: list[dict[str, object]] = []

    def add(self, one: RejectedLine) -> None:
        """Report a line."""
        self.count += 1
        if self.count <= _SHOWN_LINES:
            self._echo(f"line {one.fault.line}: {one.fault.reason}")
        if len(self.first) < _NAMED_LINES:
            self.first.append({"line": one.fault.line, "error": one.fault.reason})
        if self._file is not None and one.raw:
            self._file.write(one.raw if one.raw.endswith(b"\n") else one.raw + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
