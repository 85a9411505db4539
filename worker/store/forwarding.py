"""Port of the stores: the move of a stream's entries into its shards."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from ..keys import Source
from .batches import BatchProducerStore


class ForwardEntry(NamedTuple):
    """An entry that is moved: its id and the one field that readers look at."""

    id: bytes
    field: bytes
    value: bytes


class Forwarding(NamedTuple):
    """The oldest entries that are not in shards yet, and by which number of shards they are spread.

    ``taken``: id of the last entry of the stream that was taken for the move.
    """

    shards: int
    taken: bytes
    entries: Sequence[ForwardEntry]


class ForwardStore(BatchProducerStore, Protocol):
    """Moves entries into shards. A step that is repeated, after a kill or by another host, has no effect."""

    def forward_take(
        self, source: Source, by: str, lease_s: float, shards: int, count: int
    ) -> Forwarding | None:
        """Take at most ``count`` new entries of a stream, or return those again that are not moved yet.

        None while another host moves entries, or before a reader has created the group.
        """

    def forward_add(self, shard: str, stream: str, entries: Sequence[ForwardEntry]) -> bool:
        """Append entries of a stream to a shard, except those that it has; in the order of their ids.

        Ids may go back, where a replica with a slow clock became the master: the shard tells new entries with
        low ids from repeated ones by its last 10,000.

        Whether as many replicas as the service waits for have them.
        """

    def forward_done(self, stream: str, ids: Sequence[bytes]) -> None:
        """All these entries are in their shards: the next ones can be moved."""

    def begin_watch(self, stream: str, after: bytes) -> int | None:
        """Wait for an entry after an id, unless a wait is under way: a descriptor that becomes readable.

        None if the store cannot tell: it is asked again.
        """

    def end_watch(self, stream: str) -> None:
        """End the wait of a descriptor that became readable."""

    def used_shards(self, stream: str) -> set[int]:
        """The numbers of shards that services have spread this stream over, except those forgotten."""

    def forget_shards(self, stream: str, shards: int) -> None:
        """Shards of this number have been empty for long: they are not `used_shards` any more."""
