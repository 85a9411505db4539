"""Shadow rebuild of a collection: fill a second collection, verify it, switch the alias, drop the old one.

Each phase can be repeated, and its state is in Redis: after a kill, any worker on any host resumes there.
Writes during a rebuild go to the live collection. Their ids go into a journal in Redis, from which the rows
are copied. For the switch, writes are paused for a few seconds. The journal starts before the first row is
copied, and each write enters its ids before and after it writes. So a copy can only be older than a write
while the journal holds its id.
"""

import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jobworker.worker import PermanentError

from ..jobstore.fence import RebuildLease, Rebuilds
from ..vectors.ports import SparseKind
from .ports import RawRow, ShadowStore
from .recall import TrueScores

log = logging.getLogger("jobworker.rebuild")

# Longer than one request to the vector store may take (30 s); after the loss of a host, the next job waits
# this long.
LEASE_MS = 60_000
# Milvus Lite scans every row for each page, so pages are large; one answer of a server is limited to 64 MiB.
PAGE_BYTES, MIN_PAGE_ROWS, PAGE_ROWS = 16 * 1024 * 1024, 100, 5000
# Target duration of a page: a kill repeats one page, and progress is reported after each.
PAGE_S = 10.0
# Characters embedded between two renewals of the lease: about ten seconds of a large model on a CPU.
EMBED_CHARS = 32 * 1024
# Ids copied in one step; and how many may remain when writes are paused: these take well under a second.
CHANGED_ROWS, REMAINING_ROWS = 500, 100
# Longest pause of writes if this process dies: longer than the one request that switches the alias (30 s).
WRITES_PAUSED_MS = 45_000
# How long running writes are waited for. A dead worker's write counts until its lease ends: then writes
# resume, and are paused again later.
WRITERS_WITHIN_S = 5.0
# For the time that a request takes. Within a minute, the clocks of two machines run at the same speed.
CLOCK_MARGIN_S = 5.0
POLL_S = 1.0
# Tries to pause writes, one POLL_S apart: longer than the lease of a dead worker's write (90 s).
QUIESCE_TRIES = 200
# After this, the server has carried out a killed process's switch request, or never will.
LATE_REQUEST_S = 5.0
# After this, searches that started on the old collection have ended.
OLD_SEARCHES_S = 10.0
# Deadline of an index build; a real server took 100 s for 50,000 rows of 1024 dimensions.
INDEX_WITHIN_S = 3600.0
# Rows whose neighbours are compared with an exact search, neighbours of each, and the lowest recall accepted.
SAMPLE_ROWS, NEIGHBOURS, MIN_RECALL = 100, 10, 0.95
MEASURE_TRIES = 5
REPORT_EVERY_S = 5.0

#: New fields for rows (`vector`, `sparse`), one mapping a row, in order.
Embed = Callable[[Sequence[RawRow]], Sequence[RawRow]]


class NewModel(NamedTuple):
    """Model that embeds every row again; `dim` is the dimension of its vectors."""

    name: str
    dim: int
    embed: Embed


class NewSparse(NamedTuple):
    """Sparse vectors of the new collection; `embed` gives those of its rows. None: rows keep theirs."""

    kind: SparseKind = "none"
    embed: Embed | None = None


class RebuildRequest(NamedTuple):
    """One collection to rebuild, and the job that asks for it.

    `entry` is this delivery of the job, `job_id` stays the same over retries. `name` is the plain name,
    `alias` the name with the prefix. Without `model`, vectors are copied. `sparse` gets the full name of
    the live collection.
    """

    job_id: str
    entry: str
    name: str
    alias: str
    model: NewModel | None = None
    sparse: Callable[[str], NewSparse] = lambda collection: NewSparse()


class Clock(NamedTuple):
    """Monotonic time and sleep, so that tests can replace them."""

    mono_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Rebuild:
    """State machine of one rebuild; `lease` holds the state that an earlier process left.

    The phases are fill, verify, settle, switch, drop and done; Redis holds the current one.
    """

    def __init__(
        self,
        request: RebuildRequest,
        shadow: ShadowStore,
        rebuilds: Rebuilds,
        lease: RebuildLease,
        clock: Clock,
    ) -> None:
        self._request, self._shadow, self._rebuilds, self._clock = request, shadow, rebuilds, clock
        self._epoch = lease.epoch
        self._fields = dict(lease.fields)
        self._resumed = lease.fields.get("phase", "done") != "done"
        self._mono_reported_s = -REPORT_EVERY_S
        #: Ids in the journal whose rows a read of the live collection did not return.
        self._missing: set[str] = set()
        self._new_sparse: NewSparse | None = None
        #: Number of reads that this process announced.
        self._reads = 0
        #: Rows that this process wrote to the new collection, those of the journal included.
        self.rows_written = 0

    def run(self) -> None:
        """Run the remaining phases. The same call can be repeated after any failure.

        Raises Fenced if another process took over, PermanentError if the recall of the new collection is too
        low, and the errors of the stores.
        """
        if self._phase == "done" and self._fields.get("entry") == self._request.entry:
            hint = "an earlier delivery of this job finished it"
            log.info("rebuild.skipped", extra={"collection": self._request.alias, "hint": hint})
            return
        same_job = self._fields.get("job") == self._request.job_id
        if self.finish_switch() and same_job:
            return
        if not self._is_resumable():
            self._start()
        self._run_phases()

    def _run_phases(self) -> None:
        phases = {
            "fill": self._fill,
            "verify": self._verify,
            "settle": self._quiesce,
            "switch": self._switch,
            "drop": self._drop_old,
        }
        while self._phase != "done":
            phases[self._phase]()

    def finish_switch(self) -> bool:
        """Complete a rebuild that was interrupted in the phase switch or drop; True if it is complete now.

        False if there is none, or if its alias was not switched: the phase is then an earlier one.
        """
        interrupted = self._phase in ("switch", "drop")
        while self._phase in ("switch", "drop"):
            self._switch() if self._phase == "switch" else self._drop_old()
        return interrupted and self._phase == "done"

    def _is_resumable(self) -> bool:
        """Whether there is an unfinished rebuild for the same model whose new collection still exists.

        Its sparse vectors are of the same kind, too: rows that are copied already have them or not.
        """
        if self._phase == "done" or self._fields.get("model", "") != self._model_name:
            return False
        if self._phase == "fill" and self._fields.get("sparse", "none") != self._sparse().kind:
            return False
        target = self._fields["target"]
        if self._phase == "fill" and not self._fields["cursor"] and not self._shadow.exists(target):
            # The killed process's create request may still arrive; it carries the recorded mark.
            return True
        return self._shadow.mark(target) == self._fields.get("mark", "")

    @property
    def _phase(self) -> str:
        return self._fields.get("phase", "done")

    @property
    def _model_name(self) -> str:
        return self._request.model.name if self._request.model else ""

    def _save(self, *, shut_ms: int | None = None, journal: bool | None = None, **fields: str) -> None:
        """Store fields and renew the lease. Raises Fenced if another process took over."""
        self._rebuilds.save(
            self._request.alias, self._epoch, fields, lease_ms=LEASE_MS, shut_ms=shut_ms, journal=journal
        )
        self._fields |= fields

    # ---- phase fill

    def _start(self) -> None:
        """Discard an abandoned rebuild and record a new one in the phase fill."""
        self.discard()
        source = self._shadow.live_collection(self._request.name)
        target = next_collection(self._request.alias, source, self._shadow.exists)
        mark = f"made by jobworker for {self._request.alias}, {os.urandom(8).hex()}"
        self._new_sparse = self._request.sparse(source)
        # Recorded before the collection is created: after a kill, the next process recognises it by its mark.
        self._save(
            phase="fill", entry=self._request.entry, job=self._request.job_id, model=self._model_name,
            source=source, source_mark=self._shadow.mark(source) or "", target=target, mark=mark, cursor="",
            sparse=self._new_sparse.kind, copied="0", total=str(self._shadow.count(source)), sample="",
            model_before=self._fields.get("live_model", ""), journal=True,
        )  # fmt: skip
        fields = {"collection": self._request.alias, "target": target, "source": source}
        log.info("rebuild.filling", extra=fields)

    def discard(self) -> None:
        """Drop the new collection of an unfinished rebuild; the live collection is not touched."""
        target = self._fields.get("target", "")
        if self._phase != "done" and target and target != self._shadow.live_collection(self._request.name):
            self._drop(target, self._fields.get("mark", ""))
        self._save(phase="done", entry="", journal=False, shut_ms=0)

    def _fill(self) -> None:
        """Copy page by page in the order of ids; the cursor is the last id that was copied."""
        source, target = self._fields["source"], self._fields["target"]
        dim = self._request.model.dim if self._request.model else self._shadow.dim(source)
        kind = self._sparse().kind
        if not self._shadow.create(self._request.name, target, dim, self._fields.get("mark", ""), kind):
            self._start()
            return
        mono_start_s, copied_before = self._clock.mono_s(), int(self._fields["copied"])
        limit = MIN_PAGE_ROWS
        while rows := self._read(self._shadow.page, source, self._fields["cursor"], limit):
            mono_page_s = self._clock.mono_s()
            self._write(rows)
            limit = next_page_rows(rows, self._clock.mono_s() - mono_page_s)
            copied = int(self._fields["copied"]) + len(rows)
            sample = thin_sample([*filter(None, self._fields["sample"].split(",")), rows[0]["id"]])
            self._save(cursor=rows[-1]["id"], copied=str(copied), sample=",".join(sample), reading="")
            self._report_progress(copied, copied - copied_before, mono_start_s)
        self._save(phase="verify", reading="")

    def _read(self, read: Callable[..., list[RawRow]], *arguments: Any) -> list[RawRow]:
        """Read rows to copy. They are announced first: a deletion waits until they are written, and then
        deletes them from the new collection too."""
        self._reads += 1
        self._save(reading=str(self._reads))
        return read(*arguments)

    def _sparse(self) -> NewSparse:
        if self._new_sparse is None:
            self._new_sparse = self._request.sparse(self._fields["source"])
        return self._new_sparse

    def _write(self, rows: Sequence[RawRow]) -> None:
        embed = self._request.model.embed if self._request.model else self._sparse().embed
        if embed:
            rows = self._embed(rows, embed)
        self._shadow.upsert(self._fields["target"], rows)
        self.rows_written += len(rows)

    def _embed(self, rows: Sequence[RawRow], embed: Embed) -> list[RawRow]:
        """The rows with new vectors. The lease is renewed in between: a large model on a CPU needs minutes
        for a page."""
        embedded: list[RawRow] = []
        for part in split_by_chars(rows, EMBED_CHARS):
            embedded += [row | fields for row, fields in zip(part, embed(part), strict=True)]
            self._save()
        return embedded

    def _report_progress(self, copied: int, copied_here: int, mono_start_s: float) -> None:
        now = self._clock.mono_s()
        if now - self._mono_reported_s < REPORT_EVERY_S:
            return
        self._mono_reported_s = now
        total = max(copied, int(self._fields["total"]))
        rate = copied_here / max(now - mono_start_s, 1e-3)
        fields = {"collection": self._request.alias, "copied": copied, "rows": total}
        fields |= {"percent": round(100 * copied / total), "rows_per_s": round(rate)}
        log.info("rebuild.progress", extra={**fields, "left_s": round((total - copied) / rate)})

    # ---- phase verify

    def _verify(self) -> None:
        """Wait for the index and compare its answers with an exact search."""
        target = self._fields["target"]
        self._copy_changes(REMAINING_ROWS)
        self._shadow.flush(target)
        self._wait_for_index()
        recall = self._settled_recall(target)
        fields = {
            "collection": self._request.alias,
            "target": target,
            f"recall_at_{NEIGHBOURS}": round(recall, 4),
        }
        log.info("rebuild.verified", extra=fields)
        if recall < MIN_RECALL:
            self.discard()
            raise PermanentError(f"{target}: recall@{NEIGHBOURS} is {recall:.3f}, less than {MIN_RECALL}")
        self._save(phase="settle", recall=f"{recall:.4f}")

    def _settled_recall(self, target: str) -> float:
        """The recall, measured again while a deletion removes rows: those would count as not found."""
        for _ in range(MEASURE_TRIES):
            rows = self._shadow.count(target)
            recall = self.measure_recall(target, self._fields["sample"].split(","))
            if recall >= MIN_RECALL or self._shadow.count(target) == rows:
                break
        return recall

    def _wait_for_index(self) -> None:
        give_up_at = self._clock.mono_s() + INDEX_WITHIN_S
        while pending := self._shadow.unindexed_rows(self._fields["target"]):
            if self._clock.mono_s() > give_up_at:
                raise TimeoutError(f"{self._fields['target']}: {pending} rows still wait for the index")
            self._save()
            self._clock.sleep(POLL_S)

    def measure_recall(self, collection: str, sample: Sequence[str]) -> float:
        """recall@10 of a collection, 0 to 1, over the rows whose ids are in `sample`."""
        sampled = self._shadow.fetch(collection, [id_ for id_ in sample if id_])
        queries = [np.asarray(row["vector"], dtype=np.float32) for row in sampled]
        if not queries:
            return 1.0
        true, after = TrueScores(queries, NEIGHBOURS), ""
        while rows := self._shadow.page(collection, after, PAGE_ROWS, ("id", "vector")):
            true.add([row["vector"] for row in rows])
            after = rows[-1]["id"]
            self._save()
        return true.recall(self._shadow.search(collection, queries, NEIGHBOURS))

    # ---- phase settle

    def _quiesce(self) -> None:
        """Pause writes once both collections hold the same rows, and record the phase switch.

        Raises TimeoutError if no try found such a moment.
        """
        for _ in range(QUIESCE_TRIES):
            self._copy_changes(REMAINING_ROWS)
            self._save(shut_ms=WRITES_PAUSED_MS)
            resumes_at = self._clock.mono_s() + WRITES_PAUSED_MS / 1000 - CLOCK_MARGIN_S
            if (
                self._wait_for_writers()
                and self._copy_changes(0)
                and self._reconcile()
                and self._clock.mono_s() < resumes_at
            ):
                # Before the switch: vectors of another model are refused even if this process dies after it.
                live_model = self._model_name or self._fields.get("live_model", "")
                self._save(phase="switch", live_model=live_model, shut_ms=WRITES_PAUSED_MS)
                self._resumed = False
                return
            self._save(shut_ms=0)
            self._clock.sleep(POLL_S)
        raise TimeoutError(f"{self._request.alias}: found no moment without writes to switch")

    def _wait_for_writers(self) -> bool:
        give_up_at = self._clock.mono_s() + WRITERS_WITHIN_S
        while self._rebuilds.writers(self._request.alias):
            if self._clock.mono_s() > give_up_at:
                return False
            self._clock.sleep(0.02)  # writes take 10 to 100 ms; only Redis knows of them
        return True

    def _copy_changes(self, max_remaining: int) -> bool:
        """Copy the rows in the journal until at most `max_remaining` ids are in it.

        False if `max_remaining` is 0 and more rows change than can be copied while writes are paused.
        """
        give_up_at = self._clock.mono_s() + WRITES_PAUSED_MS / 3000
        copied: list[str] = []
        while copied := self._rebuilds.changed(self._request.alias, copied, CHANGED_ROWS):
            self._copy_rows(copied)
            self._save()
            if len(copied) <= max_remaining:
                self._rebuilds.changed(self._request.alias, copied, 1)
                break
            if self._clock.mono_s() > give_up_at and not max_remaining:
                return False
        return True

    def _copy_rows(self, ids: Sequence[str]) -> None:
        """Copy rows from the live collection; ids that it does not return are kept in `_missing`."""
        rows = self._read(self._shadow.fetch, self._fields["source"], ids)
        if rows:
            self._write(rows)
        self._save(reading="")
        self._missing.update(ids)
        self._missing.difference_update(row["id"] for row in rows)

    def _delete_missing(self) -> None:
        """Delete the rows that were deleted from the live collection. Only while writes are paused."""
        trusted_at = self._clock.mono_s() + self._shadow.max_read_lag_s()
        while self._missing and self._clock.mono_s() < trusted_at:
            self._clock.sleep(POLL_S)
            self._copy_rows(sorted(self._missing))
        if self._missing:
            self._shadow.delete(self._fields["target"], sorted(self._missing))
            self._missing.clear()

    def _reconcile(self) -> bool:
        """Apply deletions; True if both collections then hold the same number of rows.

        Otherwise another program wrote without admission: its rows are copied, after writes are resumed.
        """
        self._delete_missing()
        source, target = self._fields["source"], self._fields["target"]
        trusted_at = self._clock.mono_s() + self._shadow.max_read_lag_s()
        while self._shadow.count(source) == self._shadow.count(target):
            # Equal for once is not enough: a row that the count misses may be one that the copy missed too.
            if self._clock.mono_s() >= trusted_at:
                return True
            self._clock.sleep(POLL_S)
        self._save(shut_ms=0)
        differing = sorted(self._ids(source) ^ self._ids(target))
        log.warning("rebuild.reconciled", extra={"collection": self._request.alias, "rows": len(differing)})
        for start in range(0, len(differing), CHANGED_ROWS):
            self._copy_rows(differing[start : start + CHANGED_ROWS])
            self._save()
        return False

    def _ids(self, collection: str) -> set[str]:
        ids: set[str] = set()
        after = ""
        while rows := self._shadow.page(collection, after, PAGE_ROWS, ("id",)):
            ids.update(row["id"] for row in rows)
            after = rows[-1]["id"]
            self._save()
        return ids

    # ---- phases switch and drop

    def _switch(self) -> None:
        """Point the alias to the new collection and resume writes."""
        target = self._fields["target"]
        if self._resumed:
            self._save(shut_ms=WRITES_PAUSED_MS)
            self._clock.sleep(LATE_REQUEST_S)
            if self._shadow.live_collection(self._request.name) != target:
                # Writes may have resumed since: the new collection may lack some of them.
                self._save(phase="settle", live_model=self._fields.get("model_before", ""), shut_ms=0)
                return
        # Also after a resume: the process before may have been killed half-way.
        self._shadow.switch_alias(self._request.name, target)
        self._save(phase="drop", shut_ms=0, journal=False)
        log.info("rebuild.switched", extra={"collection": self._request.alias, "target": target})

    def _drop_old(self) -> None:
        give_up_at = self._clock.mono_s() + OLD_SEARCHES_S
        while self._clock.mono_s() < give_up_at:
            self._save()
            self._clock.sleep(POLL_S)
        self._drop(self._fields["source"], self._fields.get("source_mark", ""))
        self._save(phase="done", entry=self._request.entry)

    def _drop(self, collection: str, mark: str) -> None:
        """Drop a recorded collection, unless another one has its name now or an alias names it."""
        if not self._shadow.drop(collection, mark):
            fields = {"collection": self._request.alias, "kept": collection}
            hint = "an alias names it, or another program made it"
            log.warning("rebuild.not_dropped", extra={**fields, "hint": hint})


def next_collection(alias: str, source: str, exists: Callable[[str], bool]) -> str:
    """The next free name of a collection behind an alias: `a_v1`, `a_v2`, ..."""
    number = re.fullmatch(re.escape(alias) + r"_v([0-9]+)", source)
    names = (f"{alias}_v{n}" for n in itertools.count(int(number[1]) + 1 if number else 2))
    return next(name for name in names if not exists(name))


def split_by_chars(rows: Sequence[RawRow], max_chars: int) -> Iterator[Sequence[RawRow]]:
    """Consecutive rows with at most `max_chars` characters of text together; a larger row is a part of its
    own."""
    start = chars = 0
    for index, row in enumerate(rows):
        row_chars = sum(len(value) for value in row.values() if isinstance(value, str))
        if index > start and chars + row_chars > max_chars:
            yield rows[start:index]
            start, chars = index, 0
        chars += row_chars
    yield rows[start:]


def next_page_rows(rows: Sequence[RawRow], took_s: float) -> int:
    """Rows of the next page, from the size of the last one and the seconds that its copy took.

    A vector has 4 bytes a number; a text has up to 64 KiB, at 3 bytes a character.
    """
    size = sum(4 * len(row["vector"]) + 3 * len(str(row.get("text_content", ""))) for row in rows)
    in_time = int(len(rows) * PAGE_S / max(took_s, 1e-3))
    return max(MIN_PAGE_ROWS, min(PAGE_ROWS, PAGE_BYTES * len(rows) // max(size, 1), in_time))


def thin_sample(sample: list[str]) -> list[str]:
    """The sample without every second id, if it has more than SAMPLE_ROWS: it stays spread over all pages."""
    return sample if len(sample) <= SAMPLE_ROWS else sample[::2]
