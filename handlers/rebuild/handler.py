"""Handler of `index_rebuild`: rebuilds the vector index of a collection, by default without a gap."""

import logging
from collections.abc import Sequence
from typing import Any

from jobworker.worker import Job, PermanentError, StoreUnavailable, Unavailable

from ..encoder.base import Encoder
from ..encoder.find_model import ModelError
from ..encoder.load import load_encoder
from ..jobstore.fence import Rebuilds
from ..jobstore.open import open_rebuilds
from ..settings import HandlerSettings
from ..vectors.ports import Vector
from ..vectors.schema import plain_name, shown
from .ports import Record, ShadowStore
from .rebuild import LEASE_MS, Clock, Model, Rebuild, Task

log = logging.getLogger("jobworker.reindex")

# In place each step takes up to 10 min, and no writer and no other rebuild is admitted meanwhile.
IN_PLACE_MS = 25 * 60 * 1000


class RebuildBusy(Exception):
    """Another rebuild of the collection is under way: worth another try."""


class IndexRebuild:
    """Rebuilds one collection: payload `collection`, optional `mode` (`shadow`, `in_place`), `model`.

    `shadow`: searches continue, and writes except for moments. `in_place`: searches fail until it is done.
    `model`: embed every text again with it; afterwards only a service started with it may write.
    """

    # Rows by the million take hours; a stuck request has limits of its own.
    timeout = 24 * 3600.0
    needs_device = True
    # Nothing is to wait for hours behind it in its worker.
    alone = True

    def __init__(
        self,
        shadow: ShadowStore | None = None,
        rebuilds: Rebuilds | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._given_shadow, self._given_rebuilds = shadow, rebuilds
        self._clock = clock or Clock()
        #: Running totals of this process.
        self.counters = {"rebuilds_done": 0, "rebuilt_rows": 0}

    def setup(self, settings: HandlerSettings) -> None:
        """Connects to nothing yet: rebuilds are rare."""
        self._settings = settings
        self._shadow = self._given_shadow or _open_shadow(settings)
        self._rebuilds = self._given_rebuilds or open_rebuilds(settings.redis_url)

    def handle(self, job: Job) -> None:
        """Rebuild a collection, or resume where a killed worker stopped.

        Raises PermanentError for a bad payload or a new collection that is no good, Busy where another
        rebuild is under way, Unavailable where a store does not answer.
        """
        name, mode, model = read_payload(job.payload, self._settings.milvus_prefix)
        table = self._settings.milvus_prefix + name
        entry = f"{job.stream}/{job.entry_id}"
        try:
            taken = self._rebuilds.begin(table, entry, LEASE_MS)
            if isinstance(taken, str):
                raise RebuildBusy(f"{table} is being rebuilt by the job at {taken}")
            task = Task(job.id, entry, name, table, self._model(model))
            rebuild = Rebuild(task, self._shadow, self._rebuilds, taken, self._clock)
            try:
                rebuild.run() if mode == "shadow" else self._in_place(task, rebuild, taken.epoch)
                self.counters["rebuilds_done"] += 1
            finally:
                self.counters["rebuilt_rows"] += rebuild.rows
                # For the next try, which is another entry; after a kill the same one comes again.
                self._rebuilds.save(table, taken.epoch, {}, lease_ms=0)
        except StoreUnavailable as error:
            raise Unavailable(str(error)) from error

    def _in_place(self, task: Task, rebuild: Rebuild, epoch: int) -> None:
        rebuild.finish()
        rebuild.forget()
        self._rebuilds.save(task.table, epoch, {}, lease_ms=IN_PLACE_MS, shut_ms=IN_PLACE_MS)
        try:
            self._shadow.reindex(task.name)
        finally:
            self._rebuilds.save(task.table, epoch, {}, lease_ms=LEASE_MS, shut_ms=0)

    def _model(self, name: str) -> Model | None:
        if not name:
            return None
        of = self._settings
        try:
            encoder = load_encoder(
                name,
                of.device,
                threads=of.threads,
                long_text=of.long_text,
                token_budget=of.token_budget,
                dtype=of.dtype,
            )
        except ModelError as error:
            raise PermanentError(str(error)) from error
        return Model(encoder.name, encoder.dim, lambda records: embed(encoder, records))


def embed(encoder: Encoder, records: Sequence[Record]) -> Sequence[Vector]:
    """New vectors for rows, from the text that is stored with each."""
    return list(encoder.encode([text_of(record) for record in records]))


def text_of(record: Record) -> str:
    """The text behind a row's vector; for an entity its name and description."""
    if "text_content" in record:
        return str(record["text_content"])
    return "\n".join(filter(None, (record.get("name"), record.get("description"))))


def read_payload(payload: Any, prefix: str) -> tuple[str, str, str]:
    """Collection without prefix, mode and model. Raises PermanentError that says what is wrong."""
    if not isinstance(payload, dict):
        raise PermanentError(f"payload must be an object, not {shown(payload)}")
    name = plain_name(payload.get("collection"), prefix)
    mode = payload.get("mode") or "shadow"
    if mode not in ("shadow", "in_place"):
        raise PermanentError(f"mode must be shadow or in_place, not {shown(mode)}")
    model = payload.get("model") or ""
    if not isinstance(model, str) or (model and mode != "shadow"):
        raise PermanentError(
            f"model must be a string, and goes with the mode shadow only, not {shown(model)}"
        )
    return name, mode, model


def _open_shadow(settings: HandlerSettings) -> ShadowStore:
    # Only where no store was given: this imports the Milvus client.
    from .milvus import open_shadow

    return open_shadow(
        settings.milvus_uri,
        token=settings.milvus_token or None,
        prefix=settings.milvus_prefix,
        named=settings.milvus_partitions == "named",
    )
