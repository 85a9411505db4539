"""One rebuild of a collection: fill a second one, verify it, put it in the first one's place, drop the first.

Every step can be repeated, and the state is in Redis: after a kill any worker on any host resumes there.
Writes that come meanwhile go to the live collection, and their ids into a journal of the job store, from
which they are copied; for the switch the door for writers is shut for some moments. The journal begins before
the first row is copied, and each write enters it both before and after it is made, so that no copy can be
older than the write unless the journal still names it.
"""

import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jobworker.worker import PermanentError

from ..jobstore.fence import RebuildLease, Rebuilds
from ..vectors.ports import Vector
from .ports import Record, ShadowStore
from .recall import TrueScores

log = logging.getLogger("jobworker.rebuild")

# Longer than one request to the vector store may take (30 s); the next to come waits as long for a lost host.
LEASE_MS = 60_000
# Milvus Lite looks at every row for each page, so pages are large; one answer of a server may have 64 MiB.
PAGE_BYTES, MIN_PAGE_ROWS, PAGE_ROWS = 16 * 1024 * 1024, 100, 5000
# And about so long: a kill costs one page, and progress is told by pages.
PAGE_S = 10.0
# Characters embedded between two renewals of the lease: some ten seconds of a large model on a processor.
EMBED_CHARS = 32 * 1024
# Ids copied at once, and how few may be left when the door is shut: copying these takes well under a second.
CHANGED_ROWS, FEW_ROWS = 500, 100
# How long the door stays shut at most if this process dies: longer than the one request that switches (30 s).
SHUT_MS = 45_000
# How long writes that are under way are waited for; that of a dead worker may stay for its whole lease, so
# the door is opened again then, and shut later.
DRAIN_S = 5.0
# Two machines' clocks run nearly alike for less than a minute; this is for the way of a request.
MARGIN_S = 5.0
PAUSE_S = 1.0
# Tries to find a moment without writes, each with a pause: beyond the lease of a dead worker's write (90 s).
SETTLE_TRIES = 200
# The request of a process that was killed while it switched has long been carried out, or never will be.
LATE_REQUEST_S = 5.0
# Searches that began on the old collection have ended.
OLD_SEARCHES_S = 10.0
# An index is waited for; a real server took 100 s for 50,000 rows of 1024 dimensions.
INDEX_WITHIN_S = 3600.0
# Rows whose neighbours are compared with the truth, and how many of each. Less recall is no index to go live.
SAMPLE_ROWS, NEIGHBOURS, MIN_RECALL = 100, 10, 0.95
REPORT_EVERY_S = 5.0

#: New vectors for records.
Embed = Callable[[Sequence[Record]], Sequence[Vector]]


class Model(NamedTuple):
    """The model that embeds the rows again."""

    name: str
    dim: int
    embed: Embed


class Task(NamedTuple):
    """What is asked for. `entry` is this delivery of the job, `job` its id; `table` the name with prefix."""

    job: str
    entry: str
    name: str
    table: str
    model: Model | None = None


class Clock(NamedTuple):
    """Time as an argument."""

    mono_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Rebuild:
    """A rebuild that is ours; `taken` is what the process before left of it."""

    def __init__(
        self, task: Task, shadow: ShadowStore, rebuilds: Rebuilds, taken: RebuildLease, clock: Clock
    ) -> None:
        self._task, self._shadow, self._rebuilds, self._clock = task, shadow, rebuilds, clock
        self._epoch = taken.epoch
        self._fields = dict(taken.fields)
        self._resumed = taken.fields.get("phase", "done") != "done"
        self._mono_told_s = -REPORT_EVERY_S
        #: Changed rows that the live collection did not show when they were looked for.
        self._unseen: set[str] = set()
        #: Rows put into the new collection by this process, those of the journal included.
        self.rows = 0

    def run(self) -> None:
        """Do all that is left to do. Raises what the stores raise, Fenced where another took over, and
        PermanentError where the new collection is no good; everything may be repeated."""
        if self._phase == "done" and self._fields.get("entry") == self._task.entry:
            log.info(
                "rebuild.skipped", extra={"collection": self._task.table, "hint": "this job has rebuilt it"}
            )
            return
        ours = self._fields.get("job") == self._task.job
        if self.finish() and ours:
            return
        if not self._resumable():
            self._plan()
        self._go_on()

    def _go_on(self) -> None:
        steps = {
            "fill": self._fill,
            "verify": self._verify,
            "settle": self._settle,
            "switch": self._switch,
            "drop": self._drop,
        }
        while self._phase != "done":
            steps[self._phase]()

    def finish(self) -> bool:
        """Complete a rebuild that was interrupted while it switched, or later.

        False where there is none, or where the alias was not switched: the phase is then an earlier one.
        """
        begun = self._phase in ("switch", "drop")
        while self._phase in ("switch", "drop"):
            self._switch() if self._phase == "switch" else self._drop()
        return begun and self._phase == "done"

    def _resumable(self) -> bool:
        """Whether there is an unfinished rebuild for the same model whose new collection still exists."""
        if self._phase == "done" or self._fields.get("model", "") != self._model_name:
            return False
        target = self._fields["target"]
        if self._phase == "fill" and not self._fields["cursor"] and not self._shadow.exists(target):
            # The killed process's request may still arrive; it carries the recorded mark.
            return True
        return self._shadow.mark(target) == self._fields.get("mark", "")

    @property
    def _phase(self) -> str:
        return self._fields.get("phase", "done")

    @property
    def _model_name(self) -> str:
        return self._task.model.name if self._task.model else ""

    def _save(self, *, shut_ms: int | None = None, journal: bool | None = None, **fields: str) -> None:
        """Keep fields, and with them the lease. Fenced where another process has taken over."""
        self._rebuilds.save(
            self._task.table, self._epoch, fields, lease_ms=LEASE_MS, shut_ms=shut_ms, journal=journal
        )
        self._fields |= fields

    # ---- steps

    def _plan(self) -> None:
        """Start from the beginning: remove what an abandoned rebuild left."""
        self.forget()
        source = self._shadow.live(self._task.name)
        target = next_table(self._task.table, source, self._shadow.exists)
        mark = f"made by jobworker for {self._task.table}, {os.urandom(8).hex()}"
        # Recorded before the collection is made: after a kill, the next process knows which one is ours.
        self._save(
            phase="fill", entry=self._task.entry, job=self._task.job, model=self._model_name, source=source,
            source_mark=self._shadow.mark(source) or "", target=target, mark=mark, cursor="", copied="0",
            total=str(self._shadow.count(source)), sample="",
            model_before=self._fields.get("live_model", ""), journal=True,
        )  # fmt: skip
        fields = {"collection": self._task.table, "target": target, "source": source}
        log.info("rebuild.filling", extra=fields)

    def forget(self) -> None:
        """Remove what an unfinished rebuild left; the live collection is not touched."""
        left = self._fields.get("target", "")
        if self._phase != "done" and left and left != self._shadow.live(self._task.name):
            self._remove(left, self._fields.get("mark", ""))
        self._save(phase="done", entry="", journal=False, shut_ms=0)

    def _fill(self) -> None:
        """Copy page by page in the order of ids; the last id that is in is kept with each."""
        source, target = self._fields["source"], self._fields["target"]
        dim = self._task.model.dim if self._task.model else self._shadow.dim(source)
        if not self._shadow.make(self._task.name, target, dim, self._fields.get("mark", "")):
            self._plan()
            return
        mono_start_s, before = self._clock.mono_s(), int(self._fields["copied"])
        rows = MIN_PAGE_ROWS
        while records := self._shadow.page(source, self._fields["cursor"], rows):
            mono_page_s = self._clock.mono_s()
            self._put(records)
            rows = page_rows(records, self._clock.mono_s() - mono_page_s)
            copied = int(self._fields["copied"]) + len(records)
            sample = thinned([*filter(None, self._fields["sample"].split(",")), records[0]["id"]])
            self._save(cursor=records[-1]["id"], copied=str(copied), sample=",".join(sample))
            self._tell(copied, copied - before, mono_start_s)
        self._save(phase="verify")

    def _put(self, records: Sequence[Record]) -> None:
        if self._task.model:
            records = self._embedded(records, self._task.model)
        self._shadow.put(self._fields["target"], records)
        self.rows += len(records)

    def _embedded(self, records: Sequence[Record], model: Model) -> list[Record]:
        """The records with new vectors; with a large model on a processor this is what takes the time."""
        done: list[Record] = []
        for part in by_size(records, EMBED_CHARS):
            vectors = model.embed(part)
            done += [row | {"vector": vector} for row, vector in zip(part, vectors, strict=True)]
            self._save()
        return done

    def _verify(self) -> None:
        """Wait for the index and compare what it finds with the truth."""
        target = self._fields["target"]
        self._catch_up(FEW_ROWS)
        self._shadow.seal(target)
        self._wait_for_index()
        recall = self.recall(target, self._fields["sample"].split(","))
        fields = {
            "collection": self._task.table,
            "target": target,
            f"recall_at_{NEIGHBOURS}": round(recall, 4),
        }
        log.info("rebuild.verified", extra=fields)
        if recall < MIN_RECALL:
            self.forget()
            raise PermanentError(f"{target}: recall@{NEIGHBOURS} is {recall:.3f}, less than {MIN_RECALL}")
        self._save(phase="settle", recall=f"{recall:.4f}")

    def _wait_for_index(self) -> None:
        give_up_at = self._clock.mono_s() + INDEX_WITHIN_S
        while left := self._shadow.unindexed(self._fields["target"]):
            if self._clock.mono_s() > give_up_at:
                raise TimeoutError(f"{self._fields['target']}: {left} rows still wait for the index")
            self._save()
            self._clock.sleep(PAUSE_S)

    def recall(self, table: str, sample: Sequence[str]) -> float:
        """How many of the truly nearest ten rows a search finds, over rows of a sample of ids."""
        records = self._shadow.fetch(table, [id_ for id_ in sample if id_])
        queries = [np.asarray(record["vector"], dtype=np.float32) for record in records]
        if not queries:
            return 1.0
        true, after = TrueScores(queries, NEIGHBOURS), ""
        while rows := self._shadow.page(table, after, PAGE_ROWS, ("id", "vector")):
            true.add([row["vector"] for row in rows])
            after = rows[-1]["id"]
            self._save()
        return true.recall(self._shadow.nearest(table, queries, NEIGHBOURS))

    def _settle(self) -> None:
        """Find a moment in which nothing is being written and both collections hold the same."""
        for _ in range(SETTLE_TRIES):
            self._catch_up(FEW_ROWS)
            self._save(shut_ms=SHUT_MS)
            opens_at = self._clock.mono_s() + SHUT_MS / 1000 - MARGIN_S
            ready = self._drained() and self._catch_up(0) and self._removed() and self._same()
            if ready and self._clock.mono_s() < opens_at:
                # Named before the switch: no vector of another model gets in behind it, come what may.
                live = self._model_name or self._fields.get("live_model", "")
                self._save(phase="switch", live_model=live, shut_ms=SHUT_MS)
                self._resumed = False
                return
            self._save(shut_ms=0)
            self._clock.sleep(PAUSE_S)
        raise TimeoutError(f"{self._task.table}: found no moment without writes to switch")

    def _drained(self) -> bool:
        give_up_at = self._clock.mono_s() + DRAIN_S
        while self._rebuilds.writers(self._task.table):
            if self._clock.mono_s() > give_up_at:
                return False
            self._clock.sleep(0.02)  # writes take 10 to 100 ms; only Redis knows of them
        return True

    def _catch_up(self, few: int) -> bool:
        """Copy what was written meanwhile until no more than `few` rows are left; False where more come
        than can be copied in the time that the door may be shut."""
        give_up_at = self._clock.mono_s() + SHUT_MS / 3000
        done: list[str] = []
        while len(done := self._rebuilds.changed(self._task.table, done, CHANGED_ROWS)) > 0:
            self._copy(done)
            self._save()
            if len(done) <= few and few:
                self._rebuilds.changed(self._task.table, done, 1)
                break
            if self._clock.mono_s() > give_up_at and not few:
                return False
        return True

    def _copy(self, ids: Sequence[str]) -> None:
        """Make rows in the new collection what they are in the live one; `_removed` sees to those that are
        not found there."""
        records = self._shadow.fetch(self._fields["source"], ids)
        if records:
            self._put(records)
        self._unseen.update(ids)
        self._unseen.difference_update(row["id"] for row in records)

    def _removed(self) -> bool:
        """Remove the rows that the live collection has no more; while nothing is written, that is True."""
        sure_at = self._clock.mono_s() + self._shadow.blind_s()
        while self._unseen and self._clock.mono_s() < sure_at:
            self._clock.sleep(PAUSE_S)
            self._copy(sorted(self._unseen))
        if self._unseen:
            self._shadow.remove(self._fields["target"], sorted(self._unseen))
            self._unseen.clear()
        return True

    def _same(self) -> bool:
        """Whether both hold as many rows; what others than this program wrote is copied where not."""
        source, target = self._fields["source"], self._fields["target"]
        sure_at = self._clock.mono_s() + self._shadow.blind_s()
        while self._shadow.count(source) == self._shadow.count(target):
            # What the live one does not show now may be what was not copied because it did not show it then.
            if self._clock.mono_s() >= sure_at:
                return True
            self._clock.sleep(PAUSE_S)
        self._save(shut_ms=0)
        differing = sorted(self._ids(source) ^ self._ids(target))
        log.warning("rebuild.reconciled", extra={"collection": self._task.table, "rows": len(differing)})
        for start in range(0, len(differing), CHANGED_ROWS):
            self._copy(differing[start : start + CHANGED_ROWS])
            self._save()
        return False

    def _ids(self, table: str) -> set[str]:
        ids: set[str] = set()
        after = ""
        while rows := self._shadow.page(table, after, PAGE_ROWS, ("id",)):
            ids.update(row["id"] for row in rows)
            after = rows[-1]["id"]
            self._save()
        return ids

    def _switch(self) -> None:
        """Put the new collection in the place of the old one and open the door."""
        target = self._fields["target"]
        if self._resumed:
            self._save(shut_ms=SHUT_MS)
            self._clock.sleep(LATE_REQUEST_S)
            if self._shadow.live(self._task.name) != target:
                # The door may have been open since: not everything needs to be in the new one.
                self._save(phase="settle", live_model=self._fields.get("model_before", ""), shut_ms=0)
                return
        # Also after a resume: the process before may have been killed half-way.
        self._shadow.switch(self._task.name, target)
        self._save(phase="drop", shut_ms=0, journal=False)
        log.info("rebuild.switched", extra={"collection": self._task.table, "target": target})

    def _drop(self) -> None:
        give_up_at = self._clock.mono_s() + OLD_SEARCHES_S
        while self._clock.mono_s() < give_up_at:
            self._save()
            self._clock.sleep(PAUSE_S)
        self._remove(self._fields["source"], self._fields.get("source_mark", ""))
        self._save(phase="done", entry=self._task.entry)

    def _remove(self, table: str, mark: str) -> None:
        """Drop a collection that the record names, unless it is another one of the same name now."""
        if not self._shadow.drop(table, mark):
            fields = {"collection": self._task.table, "kept": table}
            hint = "an alias names it, or another program made it"
            log.warning("rebuild.not_dropped", extra={**fields, "hint": hint})

    def _tell(self, copied: int, ours: int, mono_start_s: float) -> None:
        now = self._clock.mono_s()
        if now - self._mono_told_s < REPORT_EVERY_S:
            return
        self._mono_told_s = now
        total = max(copied, int(self._fields["total"]))
        rate = ours / max(now - mono_start_s, 1e-3)
        fields = {"collection": self._task.table, "copied": copied, "rows": total}
        fields |= {"percent": round(100 * copied / total), "rows_per_s": round(rate)}
        log.info("rebuild.progress", extra={**fields, "left_s": round((total - copied) / rate)})


def next_table(alias: str, source: str, taken: Callable[[str], bool]) -> str:
    """The next free name of a collection behind an alias: `a_v1`, `a_v2`, ..."""
    number = re.fullmatch(re.escape(alias) + r"_v([0-9]+)", source)
    names = (f"{alias}_v{n}" for n in itertools.count(int(number[1]) + 1 if number else 2))
    return next(name for name in names if not taken(name))


def by_size(records: Sequence[Record], most_chars: int) -> Iterator[Sequence[Record]]:
    """Records, in order, in runs of at most `most_chars` characters of text; a larger record is alone."""
    start = chars = 0
    for at, record in enumerate(records):
        needed = sum(len(value) for value in record.values() if isinstance(value, str))
        if at > start and chars + needed > most_chars:
            yield records[start:at]
            start, chars = at, 0
        chars += needed
    yield records[start:]


def page_rows(records: Sequence[Record], took_s: float) -> int:
    """How many rows like these, which took so long, make a page: vectors of 4 bytes a number, and a text of
    up to 64 KiB."""
    size = sum(4 * len(row["vector"]) + 3 * len(str(row.get("text_content", ""))) for row in records)
    in_time = int(len(records) * PAGE_S / max(took_s, 1e-3))
    return max(MIN_PAGE_ROWS, min(PAGE_ROWS, PAGE_BYTES * len(records) // max(size, 1), in_time))


def thinned(sample: list[str]) -> list[str]:
    """A sample that stays spread over all pages and small: every second one is left out when it grows."""
    return sample if len(sample) <= SAMPLE_ROWS else sample[::2]
