"""Outcomes of jobs whose stream is isolated: they wait here until the store takes settlements again."""

from collections import defaultdict
from typing import NamedTuple

from ..ipc.channel import KeptValue
from ..ipc.inflight import InFlightJob
from ..outcome import Failure


class FailedJob(NamedTuple):
    """A job whose run failed, or whose worker died. ``worker`` names the slot."""

    row: InFlightJob
    failure: Failure
    worker: str
    #: Facts about the worker's death for the dead letter.
    details: dict[str, object] | None = None


class KeptJob(NamedTuple):
    """A job that succeeded and whose result is kept."""

    row: InFlightJob
    kept: KeptValue


class HeldOutcomes:
    """Held outcomes by stream number and entry id, without the jobs' bytes.

    Their number is bounded by what was in flight when the stream was isolated. Their entries stay pending: if
    the reader ends, they run again.
    """

    def __init__(self) -> None:
        #: Type numbers of the jobs that succeeded.
        self.done: dict[int, dict[bytes, int]] = defaultdict(dict)
        self.failed: dict[int, dict[bytes, FailedJob]] = defaultdict(dict)
        self.kept: dict[int, dict[bytes, KeptJob]] = defaultdict(dict)

    def stream_nos(self) -> set[int]:
        """The streams that have held outcomes."""
        return {*self.done, *self.failed, *self.kept}

    def keys(self) -> set[tuple[int, bytes]]:
        """Stream number and entry id of each."""
        return {
            (stream_no, id)
            for held in (self.done, self.failed, self.kept)
            for stream_no in held
            for id in held[stream_no]
        }

    def discard(self, stream_no: int, ids: set[bytes]) -> None:
        """Forget entries that another consumer has claimed."""
        for held in (self.done, self.failed, self.kept):
            for id in ids & held.get(stream_no, {}).keys():
                del held[stream_no][id]

    def clear(self, stream_no: int) -> None:
        """Forget the outcomes of a stream: they are settled."""
        self.done.pop(stream_no, None)
        self.failed.pop(stream_no, None)
        self.kept.pop(stream_no, None)
