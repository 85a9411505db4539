"""Projection of summary and entity records into rows of the vector store; the record is authoritative."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..jobstore.records import Record, RecordKey, Records
from ..vectors.ports import AnyRow, TransientStoreError
from ..vectors.versioned_writer import VersionedRows, VersionedWriter

#: Each further round means that a newer record was stored meanwhile; twenty in a row are not expected.
_MAX_ROUNDS = 20


class ProjectedRecord(NamedTuple):
    """Key of a record, and the collection that holds its row."""

    key: RecordKey
    collection: str


#: Builds rows from records, one a record, in order.
BuildRows = Callable[[Sequence[tuple[ProjectedRecord, Record]]], Sequence[AnyRow]]


class Projection:
    """Writes rows from records, again until no record changed during the write.

    A vector store has no compare-and-set. So a writer reads the record again after it has written the row,
    and writes again if the record is newer. Of several writers, the last one sees the newest record. A row is
    older than its record only while a writer works on it, or until the job of a killed writer runs again. If
    the server carries out a killed writer's request after that, the chapter's next job corrects the row.
    """

    def __init__(self, records: Records, writer: VersionedWriter, build_rows: BuildRows) -> None:
        self._records, self._writer, self._build_rows = records, writer, build_rows

    def update(self, owner: str, delivery: str, projected: Sequence[ProjectedRecord]) -> None:
        """Bring the rows up to their records; `owner` is the job id, `delivery` the entry that is run.

        Repeatable. Raises TransientStoreError if the records keep changing, and the errors of the stores.
        """
        outdated = {item: record for item in projected if (record := self._records.get(item.key))}
        for _ in range(_MAX_ROUNDS):
            if not outdated:
                return
            self._write(owner, delivery, outdated)
            now = {item: self._records.get(item.key) for item in outdated}
            outdated = {
                i: record for i, record in now.items() if record is not None and record != outdated[i]
            }
        raise TransientStoreError("summaries: the records changed each time that their rows were written")

    def _write(self, owner: str, delivery: str, outdated: dict[ProjectedRecord, Record]) -> None:
        rows = self._build_rows(list(outdated.items()))
        by_collection: dict[str, list[AnyRow]] = {}
        for item, row in zip(outdated, rows, strict=True):
            by_collection.setdefault(item.collection, []).append(row)
        for collection, collection_rows in by_collection.items():
            # Without a version, since the record has decided which one is newest. The minimum version of a
            # replaced chapter applies to its texts, not to its summary. Each row is a write of its own: the
            # records may be of jobs before and after a deletion.
            writes = [VersionedRows(owner, [row], delivery=f"{delivery}/{row.id}") for row in collection_rows]
            self._writer.write(collection, writes)
