"""Batches of a deployment, for people: the list and one batch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ..batches import Batch, read_batch
from ..errors import StoreRefused

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

#: Unknown times sort first: the batch is as good as new.
_NEWEST = float("inf")


class BatchList(NamedTuple):
    """Batches, and what the store refused to show, in words."""

    batches: list[Batch]
    refused: list[str]


def list_batches(store: "OperatorStore", streams: Iterable[str], limit: int) -> BatchList:
    """The batches whose home is one of the streams: unfinished ones, then finished ones, each newest first.

    At most ``limit`` of each stream, and in all.
    """
    found, refused = list[Batch](), list[str]()
    for stream in dict.fromkeys(streams):
        try:
            ids = store.batch_ids(stream, limit)
        except StoreRefused as error:
            refused.append(f"batches of {stream}: {error}")
            continue
        for id in ids:
            try:
                batch = read_batch(store, stream, id)
            except StoreRefused as error:
                refused.append(f"batch {id} of {stream}: {error}")
                continue
            if batch is not None:
                found.append(batch)
    return BatchList(sorted(found, key=_rank)[:limit], refused)


def ended_since(batch: Batch, wall_s: float) -> bool:
    """Whether a batch is unfinished, or has finished after a time (unix seconds)."""
    finished_s = batch.record.wall_finished_s
    return finished_s is None or finished_s >= wall_s


def _rank(batch: Batch) -> tuple[bool, float]:
    record = batch.record
    times = record.wall_finished_s, record.wall_created_s
    newest = next((wall_s for wall_s in times if wall_s), _NEWEST)
    return batch.state == "finished", -newest
