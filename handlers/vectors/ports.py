"""The port to a vector store: rows, hits, errors and the protocol; no store in it and nothing heavy."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from jobworker.worker import PermanentError

Vector = NDArray[np.float32]


class VectorStoreError(Exception):
    """Base of what a vector store raises on purpose; `transient`: the same call may work later."""

    transient = False


class TransientStoreError(VectorStoreError):
    """The store did not answer or refused for now; a write may have been applied and may be repeated."""

    transient = True


class PermanentStoreError(VectorStoreError, PermanentError):
    """The same call can never succeed. `ids` names the rows at fault where single rows are.

    It is a PermanentError, so a handler that lets it through has its job dead-lettered without a retry.
    """

    def __init__(self, message: str, ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ids = tuple(ids)


class Row(NamedTuple):
    """One row of `story_segments`; `vector` has shape (dim,), float32.

    `version` is kept beside the fixed fields where the collection allows it (every one made here does), so
    that a reader can tell which edition of a text a row is of.
    """

    id: str
    vector: Vector
    tenant_id: str
    project_id: str
    chapter_id: str = ""
    story_time: int = 0
    segment_type: str = ""
    text_content: str = ""
    version: int = 0


class EntityRow(NamedTuple):
    """One row of `entity_profiles`; `vector` has shape (dim,), float32."""

    id: str
    vector: Vector
    tenant_id: str
    project_id: str
    entity_id: str = ""
    entity_type: str = ""
    name: str = ""
    description: str = ""
    version: int = 0


AnyRow = Row | EntityRow


class Hit(NamedTuple):
    """One answer of a search in `story_segments`; `score` is the cosine, -1 to 1, higher is nearer."""

    id: str
    score: float
    text_content: str = ""
    chapter_id: str = ""
    segment_type: str = ""


class EntityHit(NamedTuple):
    """One answer of a search in `entity_profiles`; `score` is the cosine, -1 to 1, higher is nearer."""

    id: str
    score: float
    name: str = ""
    description: str = ""
    entity_id: str = ""
    entity_type: str = ""


AnyHit = Hit | EntityHit


class VectorStore(Protocol):
    """What handlers ask of a vector store.

    Collections go by their plain names (`story_segments`); the store adds its prefix. Every method raises
    TransientStoreError where the store cannot be reached or refuses for now, PermanentStoreError where the
    call can never work. Ids, tenants and projects must match `[A-Za-z0-9_.:-]{1,64}`.
    """

    def ping(self) -> None:
        """Return if the store answers within a few seconds, else raise TransientStoreError."""

    def ensure_collection(self, name: str, dim: int) -> None:
        """Make the collection, its index and its alias if missing, and load it; many processes may call it.

        Raises PermanentStoreError where it exists with another dimension than `dim`.
        """

    def upsert(self, name: str, rows: Sequence[AnyRow]) -> None:
        """Write rows under their ids; of several rows with one id the last wins.

        Everything is checked before anything is written: PermanentStoreError names the ids of rows that are
        too long, hold a vector of the wrong shape or with NaN or infinity, or whose id belongs to another
        tenant or project. A TransientStoreError may come after some rows are in: repeat the whole call.
        """

    def search(
        self,
        name: str,
        vector: Vector,
        *,
        tenant_id: str,
        project_id: str,
        limit: int = 5,
        strong: bool = False,
    ) -> list[AnyHit]:
        """Return the rows of one tenant and project nearest to `vector` (dim,), the nearest first.

        `strong`: rows that any process has just written are found too; slower on a Milvus server.
        """

    def get(
        self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str, strong: bool = False
    ) -> list[AnyRow]:
        """Return those rows of one tenant and project whose id is in `ids`, in the order of `ids`."""

    def versions(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> dict[str, int]:
        """Return id -> version of those rows of one tenant and project, every finished write included.

        A row that carries no version has 0.
        """

    def chapter_versions(
        self, name: str, chapter_id: str, *, tenant_id: str, project_id: str
    ) -> dict[str, int]:
        """Return id -> version of all rows of a chapter, every finished write included."""

    def delete(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> None:
        """Remove those rows of one tenant and project whose id is in `ids`; absent ids are no error."""

    def count(self, name: str) -> int:
        """Return the number of rows of all tenants, every finished write included (slow)."""

    def close(self) -> None:
        """Give the connection back; may be called twice."""
