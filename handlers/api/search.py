"""Search of the HTTP API: embeds the question with the model of the collection that answers it."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jobworker.worker import StoreUnavailable
from jobworker.worker.api_role import part

from ..sparse_vector import SparseVector
from ..vectors.ports import (
    AnyHit,
    CollectionMissing,
    PermanentStoreError,
    SearchFilter,
    SparseKind,
    Vector,
    VectorStore,
    VectorStoreError,
)
from ..vectors.schema import (
    check_id,
    check_int64,
    check_search_fields,
    check_segment_type,
    plain_name,
    shown,
)
from .errors import ApiError
from .models import Models
from .payloads import MAX_HITS, SearchRequest

log = logging.getLogger("jobworker.api")

T = TypeVar("T")

#: Requests to the stores at once: each waits mostly.
THREADS = 8
#: Tries of a search during which a rebuild switches the collection: a second switch takes minutes.
TRIES = 3
RETRY_AFTER_S = 2


class Answering(NamedTuple):
    """Model of the collection that answers now (empty: the service's own), and the one that comes next."""

    model: str
    next_model: str = ""
    target: str = ""


class _Found(NamedTuple):
    """Hits; the model of the question, empty where the request brought a vector; and how they were found."""

    hits: Sequence[AnyHit]
    model: str
    mode: str = "dense"
    #: Why names were not looked for.
    note: str = ""


class Searcher:
    """Answers `SearchRequest`s.

    ``sparse``: the option of that name.
    ``open_store``: opens the vector store at the first search; None if the service has none.
    ``rebuild_state``: gives the fields of the rebuild of a collection by its full name.
    """

    def __init__(
        self,
        open_store: Callable[[], VectorStore] | None,
        rebuild_state: Callable[[str], Mapping[str, str]],
        models: Models,
        prefix: str,
        sparse: str = "auto",
    ) -> None:
        self._sparse = sparse
        self._open_store, self._rebuild_state = open_store, rebuild_state
        self._models, self._prefix = models, prefix
        self._threads = ThreadPoolExecutor(THREADS, "search")
        self._state_lock, self._open_lock = threading.Lock(), threading.Lock()
        self._opened: VectorStore | None = None

    async def warm_up(self) -> None:
        """Import the store's client, which takes most of a second, before the first search."""
        if self._open_store is not None:
            await self._in_thread(self._store)

    async def search(self, asked: SearchRequest) -> dict[str, Any]:
        """The answer of ``/v1/search``. Raises ApiError."""
        try:
            name = _check(asked, self._prefix)
            where = SearchFilter(
                tuple(asked.chapter_ids), tuple(asked.segment_types), asked.story_time_from,
                asked.story_time_to,
            )  # fmt: skip
            check_search_fields(name, where)
            found = await self._find(asked, name, where)
        except CollectionMissing as error:
            reason = f"{error}: no job has written to it"
            raise ApiError(404, reason, code="collection_not_found", param="collection") from error
        except PermanentStoreError as error:
            raise ApiError(400, str(error)) from error
        except (VectorStoreError, StoreUnavailable) as error:
            log.warning("api.store_unavailable", extra={"error": str(error)})
            store = "vector" if isinstance(error, VectorStoreError) else "job"
            raise ApiError(503, f"the {store} store does not answer", retry_after_s=RETRY_AFTER_S) from error
        least = asked.min_score
        results = [hit._asdict() for hit in found.hits if least is None or hit.score >= least]
        answer = {"object": "list", "results": results, "collection": name, "model": found.model}
        return answer | {"mode": found.mode} | ({"note": found.note} if found.note else {})

    async def _find(self, asked: SearchRequest, name: str, where: SearchFilter) -> _Found:
        if asked.vector is not None:
            with _at_fault("vector"):
                hits = await self._hits(asked, name, where, _direction(asked.vector))
            note = "" if asked.mode == "dense" else "a vector has no words: give query"
            return _Found(hits, "", note=note)
        alias = self._prefix + name
        for _ in range(TRIES):
            answering = await self._in_thread(self._answering, name, alias)
            self._models.preload(answering.next_model)
            model = self._models.of_collection(answering.model)
            kind, note = await self._in_thread(self._lexical, asked, name, model.encoder.has_sparse)
            with part("embed", texts=1):
                vectors, _, sparse = await model.embed([asked.query], "query", sparse=kind == "model")
            lexical = asked.query if kind == "bm25" else sparse[0] if sparse else None
            try:
                hits = await self._hits(asked, name, where, vectors[0], lexical)
            except PermanentStoreError:
                if not await self._changed(name, alias, answering, kind):
                    raise
                continue
            if await self._in_thread(self._answering, name, alias) == answering:
                return _Found(hits, model.encoder.name, "hybrid" if lexical else "dense", note)
        raise ApiError(503, "the collection is being exchanged", retry_after_s=RETRY_AFTER_S)

    def _lexical(self, asked: SearchRequest, name: str, model_is_sparse: bool) -> tuple[SparseKind, str]:
        """By which sparse vectors names are looked for; `none` with the reason, if it was not asked for."""
        if asked.mode == "dense":
            return "none", ""
        if self._sparse == "off":
            return "none", "sparse vectors are switched off (--sparse off)"
        kind = self._store().sparse_kind(name)
        if kind == "model" and not model_is_sparse:
            return "none", "the model gives no sparse vectors"
        if kind == "none":
            return kind, self._why_none(model_is_sparse)
        return kind, ""

    def _why_none(self, model_is_sparse: bool) -> str:
        wanted: SparseKind = "model" if model_is_sparse else "bm25"
        if self._store().supported_sparse(wanted) != "none":
            return "the collection has no sparse vectors: rebuild it"
        if model_is_sparse:
            return "the store has no sparse vectors, or they are slow there (--sparse on)"
        return "the model gives no sparse vectors, and the store has no BM25 (Milvus 2.5 or later)"

    async def _changed(self, name: str, alias: str, answering: Answering, kind: SparseKind) -> bool:
        """Whether another collection answers now than the one that refused a search."""
        if await self._in_thread(self._answering, name, alias) != answering:
            return True
        return kind != "none" and kind != await self._in_thread(
            lambda: self._store().sparse_kind(name, fresh=True)
        )

    async def _hits(
        self,
        asked: SearchRequest,
        name: str,
        where: SearchFilter,
        vector: Vector,
        lexical: SparseVector | str | None = None,
    ) -> Sequence[AnyHit]:
        def search() -> Sequence[AnyHit]:
            scope: Any = {"tenant_id": asked.tenant_id, "project_id": asked.project_id}
            scope |= {"limit": asked.limit, "where": where}
            if lexical:
                return self._store().hybrid_search(name, vector, lexical, **scope)
            return self._store().search(name, vector, **scope)

        with part("search", collection=name):
            return await self._in_thread(search)

    def _store(self) -> VectorStore:
        if self._open_store is None:
            raise ApiError(404, "this service has no vector store: give it --milvus-uri", code="no_store")
        with self._open_lock:
            if self._opened is None:
                self._opened = self._open_store()
            return self._opened

    def _answering(self, name: str, alias: str) -> Answering:
        """The model of the live collection, by what the last rebuild recorded."""
        with self._state_lock:
            state = self._rebuild_state(alias)
        phase, live = state.get("phase", "done"), state.get("live_model", "")
        target, new, old = state.get("target", ""), state.get("model", ""), state.get("model_before", "")
        if phase == "switch" and new:
            # The alias is moved in this phase, and `live_model` is the new one already.
            on_target = self._store().collection_behind(name) == target
            return Answering(new if on_target else old, new, target)
        return Answering(live, "" if phase == "done" else new, target)

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def close(self) -> None:
        """End the threads after their present requests."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _at_fault(param: str) -> Iterator[None]:
    """Name the field of which a check or the store says that it is wrong."""
    try:
        yield
    except CollectionMissing:
        raise
    except PermanentStoreError as error:
        raise ApiError(400, str(error), param=param) from error


def _direction(vector: Sequence[float]) -> Vector:
    """A vector of length 1: stores compute lengths in 32 bits, where large and small ones are inf and 0."""
    numbers = np.asarray(vector, np.float64)
    largest = np.abs(numbers).max(initial=0.0)
    if not largest:
        raise ApiError(400, "vector is empty or all zeros: it has no direction", param="vector")
    numbers = numbers / largest
    return np.asarray(numbers / np.linalg.norm(numbers), np.float32)


def _check(asked: SearchRequest, prefix: str) -> str:
    """The plain name of the collection. Raises ApiError, which names the field at fault."""
    for field in ("tenant_id", "project_id"):
        with _at_fault(field):
            check_id(field, getattr(asked, field))
    if not 1 <= asked.limit <= MAX_HITS:
        raise ApiError(400, f"limit {asked.limit} is not between 1 and {MAX_HITS}", param="limit")
    if (asked.vector is None) == (not asked.query.strip()):
        raise ApiError(400, "give either query or vector", param="query")
    if asked.vector is not None and len(asked.vector) > 32768:
        raise ApiError(400, f"vector of {len(asked.vector)} numbers", param="vector")
    _check_filters(asked)
    with _at_fault("collection"):
        name = plain_name(asked.collection, prefix)
    if asked.min_score is not None and not -1 <= asked.min_score <= 1:
        raise ApiError(400, f"min_score {shown(asked.min_score)} is not between -1 and 1", param="min_score")
    return name


def _check_filters(asked: SearchRequest) -> None:
    for field, check in (
        ("chapter_ids", partial(check_id, "chapter_id")),
        ("segment_types", check_segment_type),
    ):
        values = getattr(asked, field)
        if len(values) > MAX_HITS:
            raise ApiError(400, f"{field} has {len(values)} values, the limit is {MAX_HITS}", param=field)
        with _at_fault(field):
            for value in values:
                check(value)
    for field in ("story_time_from", "story_time_to"):
        if (value := getattr(asked, field)) is not None:
            with _at_fault(field):
                check_int64(field, value)
