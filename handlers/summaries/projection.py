"""Makes rows of the vector store follow records of the job store, which alone decide what is newest."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..jobstore.records import Record, RecordKey, Records
from ..vectors.ports import AnyRow, TransientStoreError
from ..vectors.versioned_writer import VersionedRows, VersionedWriter

log = logging.getLogger("jobworker.summaries")

#: Each further round means that a newer record was stored meanwhile; twenty in a row do not happen.
_ROUNDS = 20


class Followed(NamedTuple):
    """A record and the collection where its row stands."""

    key: RecordKey
    collection: str


#: Rows of records, one a record, in order.
MakeRows = Callable[[Sequence[tuple[Followed, Record]]], Sequence[AnyRow]]


class Projection:
    """Writes rows from records until the records have not changed while that was done.

    A vector store has no compare-and-set. So a writer reads the record again after it has written the row,
    and writes again if a newer one has come: of several writers the last reader sees the newest record. A row
    is behind its record only while a writer works on it, or until the job of a killed writer runs again; and,
    should the request of one that died be carried out later than that, until the chapter's next job.
    """

    def __init__(self, records: Records, writer: VersionedWriter, make_rows: MakeRows) -> None:
        self._records, self._writer, self._make_rows = records, writer, make_rows

    def follow(self, owner: str, all_of: Sequence[Followed]) -> None:
        """Bring the rows up to their records; `owner` names the job for the log and for rebuilds.

        Raises what the stores raise; the same call may be made again.
        """
        behind = {followed: record for followed in all_of if (record := self._records.get(followed.key))}
        for _ in range(_ROUNDS):
            if not behind:
                return
            self._write(owner, behind)
            now = {followed: self._records.get(followed.key) for followed in behind}
            behind = {f: record for f, record in now.items() if record is not None and record != behind[f]}
        raise TransientStoreError("summaries: the records changed each time that their rows were written")

    def _write(self, owner: str, behind: dict[Followed, Record]) -> None:
        rows = self._make_rows(list(behind.items()))
        by_collection: dict[str, list[AnyRow]] = {}
        for followed, row in zip(behind, rows, strict=True):
            by_collection.setdefault(followed.collection, []).append(row)
        for collection, some in by_collection.items():
            # Without a version: which one is newest was decided already, and a replaced chapter's floor,
            # which is of its texts, says nothing of its summary.
            self._writer.write(collection, [VersionedRows(owner, some)])
