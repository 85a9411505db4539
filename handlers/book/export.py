"""Export of a project's rows as JSON lines, page by page."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import orjson

from jobworker.worker import ConfigurationError
from jobworker.worker.urls import parse_http_url

from ..settings import HandlerSettings
from ..vectors.open import open_store
from ..vectors.ports import AnyRow, VectorStore, VectorStoreError
from ..vectors.schema import check_id, plain_name

#: Rows of one page; 4 MB with vectors of 1,024 dimensions.
PAGE_ROWS = 1000
#: Fields of a file that have another name in the store.
_NAMES = {"text_content": "text"}
#: The scope of the export, and what only the service needs.
_LEFT_OUT = frozenset({"tenant_id", "project_id", "created_us"})


class NoRows(Exception):
    """There is nothing to export, or the store does not let it be read; the message gives the reason."""


class ProjectRows(NamedTuple):
    """The rows of one project in a collection (by its plain name)."""

    store: VectorStore
    collection: str
    tenant_id: str
    project_id: str

    def read(self, *, vectors: bool) -> Iterator[AnyRow]:
        """All rows in the order of ids. Raises VectorStoreError."""
        after = ""
        while page := self.store.page(
            self.collection, tenant_id=self.tenant_id, project_id=self.project_id, after=after,
            limit=PAGE_ROWS, vectors=vectors,
        ):  # fmt: skip
            yield from page
            after = page[-1].id


def open_project(
    access: tuple[str, str], prefix: str, collection: str, tenant_id: str, project_id: str
) -> ProjectRows:
    """Open the rows of a project. ``access``: uri and token of Milvus. Raises ConfigurationError."""
    uri, token = access
    parse_http_url(uri, "--milvus-uri", "http://milvus.example:19530")
    store = open_store(HandlerSettings(milvus_uri=uri, milvus_token=token, milvus_prefix=prefix))
    try:
        name = plain_name(collection, prefix)
        scope = check_id("--tenant", tenant_id), check_id("--project", project_id)
    except VectorStoreError as error:
        raise ConfigurationError(str(error)) from error
    return ProjectRows(store, name, *scope)


def export_rows(rows: ProjectRows, out: str, *, vectors: bool, show: Callable[[int], None]) -> int:
    """Write rows to a file, ``-`` for standard output; returns their number. `show` gets the number so far.

    Raises NoRows.
    """
    count = 0
    try:
        with _writing(out) as file:
            for row in rows.read(vectors=vectors):
                file.write(line_of(row, vectors=vectors))
                count += 1
                show(count)
            if not count:
                raise NoRows(f"there are no rows of this tenant and project in {rows.collection}")
    except VectorStoreError as error:
        raise NoRows(f"the rows cannot be read: {error}") from error
    return count


def line_of(row: AnyRow, *, vectors: bool) -> bytes:
    """A row as a line of JSON."""
    fields = {_NAMES.get(name, name): value for name, value in row._asdict().items() if name not in _LEFT_OUT}
    if not vectors:
        del fields["vector"]
    return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


@contextmanager
def _writing(out: str) -> Iterator[BinaryIO]:
    """A file that gets its name once it is complete."""
    if out == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = f"{out}.part"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, out)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise
