"""Handler of `index_rebuild`: rebuilds a collection and its vector index, by default without downtime."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self

from jobworker.worker import Job, PermanentError, StoreUnavailable, Unavailable

from ..encoder.base import Encoder, UnsuitableText, embed
from ..encoder.find_model import ModelError, default_model, find_model
from ..encoder.load import load_from_settings
from ..encoder.sparse_head import has_head
from ..jobstore.fence import Rebuilds
from ..jobstore.open import open_rebuilds
from ..settings import HandlerSettings
from ..vectors.schema import plain_name, shown
from .ports import RawRow, ShadowStore
from .rebuild import LEASE_MS, Clock, NewModel, NewSparse, Rebuild, RebuildRequest

# In place, each step takes up to 10 minutes; until the end, no write and no other rebuild may start.
IN_PLACE_MS = 25 * 60 * 1000


class RebuildBusy(Exception):
    """Another rebuild of the collection is running; a retry may succeed."""


class RebuildPayload(NamedTuple):
    """Checked payload: plain collection name, `shadow` or `in_place`, model name or ""."""

    collection: str
    mode: str
    model: str

    @classmethod
    def parse(cls, payload: Any, prefix: str) -> Self:
        """Check a payload, whose `collection` may have the prefix or not.

        Raises PermanentError that names the field and its fault.
        """
        if not isinstance(payload, dict):
            raise PermanentError(f"payload must be an object, not {shown(payload)}")
        name = plain_name(payload.get("collection"), prefix)
        mode = payload.get("mode") or "shadow"
        if mode not in ("shadow", "in_place"):
            raise PermanentError(f"mode must be shadow or in_place, not {shown(mode)}")
        model = payload.get("model") or ""
        if not isinstance(model, str):
            raise PermanentError(f"model must be a string, not {shown(model)}")
        if model and mode != "shadow":
            raise PermanentError(f"model needs mode shadow, but mode is {mode}")
        return cls(name, mode, model)


class IndexRebuild:
    """Rebuilds one collection: payload `collection`, optional `mode` (`shadow`, `in_place`), `model`.

    `shadow`: searches continue, and writes pause for seconds only. `in_place`: searches fail until the end.
    `model`: every text is embedded again with it; then only a service started with this model can write.
    """

    # A collection of millions of rows takes hours; each request has a timeout of its own.
    timeout = 24 * 3600.0
    needs_device = True
    # No other job may wait behind it in its worker for hours.
    alone = True

    def __init__(
        self,
        shadow: ShadowStore | None = None,
        rebuilds: Rebuilds | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Arguments replace the stores that `setup` would open."""
        self._given_shadow, self._given_rebuilds = shadow, rebuilds
        self._clock = clock or Clock()
        #: Running totals of this process.
        self.counters = {"rebuilds_done": 0, "rebuilt_rows": 0}

    def setup(self, settings: HandlerSettings) -> None:
        """Create the store clients; they connect at the first job, since rebuilds are rare."""
        self._settings = settings
        self._shadow = self._given_shadow or _open_shadow(settings)
        self._rebuilds = self._given_rebuilds or open_rebuilds(settings.redis_url)

    def handle(self, job: Job) -> None:
        """Rebuild a collection, or resume where a killed worker stopped.

        Raises PermanentError for a bad payload or too low a recall, RebuildBusy if another rebuild of the
        collection is running, Unavailable if a store does not answer.
        """
        payload = RebuildPayload.parse(job.payload, self._settings.milvus_prefix)
        alias = self._settings.milvus_prefix + payload.collection
        entry = f"{job.stream}/{job.entry_id}"
        try:
            lease = self._rebuilds.begin(alias, entry, LEASE_MS)
            if isinstance(lease, str):
                raise RebuildBusy(f"{alias} is being rebuilt by the job at {lease}")
            encoder = self._load_model(payload.model)
            model = NewModel(encoder.name, encoder.dim, partial(embed_rows, encoder)) if encoder else None
            sparse = partial(self._new_sparse, encoder, lease.fields.get("live_model", ""))
            request = RebuildRequest(job.id, entry, payload.collection, alias, model, sparse)
            rebuild = Rebuild(request, self._shadow, self._rebuilds, lease, self._clock)
            try:
                if payload.mode == "shadow":
                    rebuild.run()
                else:
                    self._rebuild_in_place(request, rebuild, lease.epoch)
                self.counters["rebuilds_done"] += 1
            finally:
                self.counters["rebuilt_rows"] += rebuild.rows_written
                # A retry is a new entry and must not wait for the lease; after a kill the entry is the same.
                self._rebuilds.save(alias, lease.epoch, {}, lease_ms=0)
        except StoreUnavailable as error:
            raise Unavailable(str(error)) from error
        except UnsuitableText as error:
            raise PermanentError(str(error)) from error

    def _rebuild_in_place(self, request: RebuildRequest, rebuild: Rebuild, epoch: int) -> None:
        rebuild.finish_switch()
        rebuild.discard()
        self._rebuilds.save(request.alias, epoch, {}, lease_ms=IN_PLACE_MS, shut_ms=IN_PLACE_MS)
        try:
            self._shadow.rebuild_index(request.name)
        finally:
            self._rebuilds.save(request.alias, epoch, {}, lease_ms=LEASE_MS, shut_ms=0)

    def _load_model(self, name: str) -> Encoder | None:
        if not name:
            return None
        try:
            return load_from_settings(self._settings, name)
        except ModelError as error:
            raise PermanentError(str(error)) from error

    def _new_sparse(self, encoder: Encoder | None, live_model: str, live: str) -> NewSparse:
        """Sparse vectors of the new collection; `live` is the full name of the old one.

        `encoder` is the model of all new vectors. Without one rows keep theirs, and the model of the live
        collection adds sparse vectors if they have none.
        """
        if self._settings.sparse == "off":
            return NewSparse()
        supported = self._shadow.supported_sparse
        if encoder is None and supported("model") == "model" and self._has_head(live_model):
            if self._shadow.sparse_kind(live) == "model":
                return NewSparse("model")
            own = load_from_settings(self._settings, live_model)
            if own.has_sparse:
                return NewSparse("model", partial(sparse_of_rows, own))
        return NewSparse(supported("model" if encoder and encoder.has_sparse else "bm25"))

    def _has_head(self, model: str) -> bool:
        try:
            return has_head(find_model(model or self._settings.model or default_model()).folder)
        except ModelError:
            return False  # a model without a folder


def embed_rows(encoder: Encoder, rows: Sequence[RawRow]) -> Sequence[RawRow]:
    """New vectors for rows, from the text that is stored with each."""
    vectors, sparse = embed(encoder, encoder.tokenize([embedded_text(row) for row in rows]), sparse=True)
    if sparse is None:
        return [{"vector": vector} for vector in vectors]
    return [{"vector": vector, "sparse": one} for vector, one in zip(vectors, sparse, strict=True)]


def sparse_of_rows(encoder: Encoder, rows: Sequence[RawRow]) -> Sequence[RawRow]:
    """Sparse vectors for rows, from the text that is stored with each; they keep their dense ones."""
    return [{"sparse": row["sparse"]} for row in embed_rows(encoder, rows)]


def embedded_text(row: RawRow) -> str:
    """The text that is embedded for a row: of an entity, its name and description."""
    if "text_content" in row:
        return str(row["text_content"])
    return "\n".join(filter(None, (row.get("name"), row.get("description"))))


def _open_shadow(settings: HandlerSettings) -> ShadowStore:
    # Imported here: with a store given, pymilvus is not loaded.
    from .milvus import open_shadow

    return open_shadow(
        settings.milvus_uri,
        token=settings.milvus_token or None,
        prefix=settings.milvus_prefix,
        named=settings.milvus_partitions == "named",
        sparse_on_lite=settings.sparse == "on",
    )
