"""Port to a vector store: rows, hits, errors and the protocol. Imports no store and nothing heavy."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from jobworker.worker import PermanentError

from ..jobstore.erasures import Scope
from ..sparse_vector import SparseVector

#: Where the sparse vectors of a collection come from: nowhere, the model, or the store's BM25.
SparseKind = Literal["none", "model", "bm25"]
Vector = NDArray[np.float32]


class VectorStoreError(Exception):
    """Base class of a vector store's errors; `transient`: the same call may succeed later."""

    transient = False


class TransientStoreError(VectorStoreError):
    """The store did not answer or is overloaded. A write may have been applied, and may be repeated."""

    transient = True


class SuspectStoreError(TransientStoreError):
    """The store refused a call without saying why: it is in trouble, or the fault is that of the rows."""


class CollectionUnavailable(SuspectStoreError):
    """The collection cannot be used for now; others may work."""


class WriteRefused(VectorStoreError):
    """The store refuses this write and carries out others: a failed try of the job, worth its retries."""


class PermanentStoreError(VectorStoreError, PermanentError):
    """The same call can never succeed; `ids` names the rows at fault, if any.

    As a PermanentError, it dead-letters a job without a retry if the handler does not catch it.
    """

    def __init__(self, message: str, ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ids = tuple(ids)


class CollectionMissing(PermanentStoreError):
    """The collection does not exist."""


class SearchFilter(NamedTuple):
    """Rows that a search may find: of one of these chapters, of one of these types, and in the time range.

    An empty tuple or None sets no limit. Only collections of segments have these fields.
    """

    chapter_ids: tuple[str, ...] = ()
    segment_types: tuple[str, ...] = ()
    story_time_from: int | None = None
    story_time_to: int | None = None


NO_FILTER = SearchFilter()


class Row(NamedTuple):
    """One row of `story_segments`; `vector` has shape (dim,), float32.

    `version` and `created_us` are stored if the collection permits dynamic fields, as all collections created
    here do. They tell which version of a text the row belongs to, and when its job was created (unix
    microseconds, 0 for unknown). `sparse` is written to a collection with sparse vectors of the
    model, and never read back.
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
    created_us: int = 0
    sparse: SparseVector | None = None


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
    created_us: int = 0
    sparse: SparseVector | None = None


class StoredRow(NamedTuple):
    """What a deletion needs to know of a row; a field that the collection lacks is empty."""

    id: str
    project_id: str
    chapter_id: str
    entity_id: str
    created_us: int


AnyRow = Row | EntityRow


class Hit(NamedTuple):
    """Search result of `story_segments`; `score` is the cosine, -1 to 1, higher is nearer."""

    id: str
    score: float
    text_content: str = ""
    chapter_id: str = ""
    segment_type: str = ""
    story_time: int = 0


class EntityHit(NamedTuple):
    """Search result of `entity_profiles`; `score` is the cosine, -1 to 1, higher is nearer."""

    id: str
    score: float
    name: str = ""
    description: str = ""
    entity_id: str = ""
    entity_type: str = ""


AnyHit = Hit | EntityHit


class VectorStore(Protocol):
    """Port to a vector store.

    Collections have their plain names (`story_segments`); the store adds its prefix. Every method raises
    TransientStoreError if the store cannot be reached or is overloaded, PermanentStoreError if the call can
    never succeed. Ids, tenants and projects must match `[A-Za-z0-9_.:-]{1,64}`.
    """

    def ping(self) -> None:
        """Return if the store answers within a few seconds, else raise TransientStoreError."""

    def ensure_collection(self, name: str, dim: int, sparse: SparseKind = "none") -> None:
        """Create the collection, its indexes and its alias if missing, and load it. Safe in many processes.

        A new collection gets the field `sparse` for this kind, as far as the store supports it.

        Raises PermanentStoreError if it exists with another dimension than `dim`, or with fields that cannot
        hold the rows of this service.
        """

    def upsert(self, name: str, rows: Sequence[AnyRow]) -> None:
        """Write rows under their ids; of several rows with one id the last wins.

        All rows are checked before the first is written. PermanentStoreError names the ids of rows that are
        too long, have a vector of the wrong shape or with NaN or infinity, or whose id belongs to another
        tenant or project. After a TransientStoreError some rows may be stored: repeat the whole call.
        """

    def check_writable(self, name: str) -> None:
        """Read from the collection and write to it, without an effect. Raises the store's errors."""

    def search(
        self,
        name: str,
        vector: Vector,
        *,
        tenant_id: str,
        project_id: str,
        limit: int = 5,
        strong: bool = False,
        where: SearchFilter = NO_FILTER,
    ) -> list[AnyHit]:
        """The rows of one tenant and project nearest to `vector` (dim,), the nearest first.

        `strong` includes every finished write of any process; slower on a Milvus server.
        """

    def sparse_kind(self, name: str, *, fresh: bool = False) -> SparseKind:
        """Sparse vectors of the collection that answers now. Raises CollectionMissing.

        Another process may have rebuilt it within the last seconds, unless `fresh`.
        """

    def supported_sparse(self, kind: SparseKind) -> SparseKind:
        """The kind, or `none` where the store lacks it or a search by it is slow."""

    def hybrid_search(
        self,
        name: str,
        vector: Vector,
        lexical: SparseVector | str,
        *,
        tenant_id: str,
        project_id: str,
        limit: int = 5,
        where: SearchFilter = NO_FILTER,
    ) -> list[AnyHit]:
        """As `search`, in the order of both ranks fused (`fusion`); the score of a hit is its cosine.

        `lexical`: the sparse vector of the question, for the kind `bm25` its text. Raises PermanentStoreError
        if the collection has no such vectors.
        """

    def get(
        self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str, strong: bool = False
    ) -> list[AnyRow]:
        """The rows of one tenant and project with these ids, in the order of `ids`."""

    def versions(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> dict[str, int]:
        """Id -> version of the rows of one tenant and project, including every finished write.

        A row without a version has 0.
        """

    def chapter_versions(
        self, name: str, chapter_id: str, *, tenant_id: str, project_id: str
    ) -> dict[str, int]:
        """Id -> version of all rows of a chapter, including every finished write."""

    def scan(self, name: str, scope: Scope, after: str, limit: int) -> list[StoredRow]:
        """The next rows of a scope after the id `after`, in the order of ids, with every finished write.

        It may return fewer than `limit`; it returns none only at the end.
        """

    def page(
        self, name: str, *, tenant_id: str, project_id: str, after: str, limit: int, vectors: bool
    ) -> list[AnyRow]:
        """The next rows of one tenant and project after the id `after`, in the order of ids, with every
        finished write.

        It may return fewer than `limit`; it returns none only at the end. Without `vectors` those of the rows
        have shape (0,).
        """

    def erase_copy(self, collection: str, scope: Scope, cutoff_us: int) -> int:
        """Delete the rows of a scope that were created until `cutoff_us` from a collection by its full name,
        which a rebuild fills or has replaced; returns how many. Without an effect if it does not exist."""

    def collections(self) -> list[str]:
        """Plain names of all collections with the prefix that can hold rows of tenants."""

    def max_read_lag_s(self) -> float:
        """For how many seconds reads may miss existing rows; 0.0 if they never do."""

    def delete(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> None:
        """Delete the rows of one tenant and project with these ids; missing ids are no error."""

    def collection_behind(self, name: str) -> str:
        """Full name of the collection that answers now: the name itself is an alias.

        Raises CollectionMissing.
        """

    def count(self, name: str) -> int:
        """Number of rows of all tenants, including every finished write (slow)."""

    def close(self) -> None:
        """Close the connection; may be called twice."""
