"""Leases of this consumer: lists its pending entries, renews them, claims those of lost hosts."""

import logging
from collections.abc import Callable, Sequence

from ..errors import Fenced, StoreUnavailable
from ..ipc.marks import UNTOUCHABLE_AT, Marks
from ..settings import Settings
from ..store.ports import Entry, ReaderStore
from ..telemetry.metrics import MetricsBuffer
from .dispatch import WorkerHandle
from .prefetch import PrefetchBuffer

#: Entries of one answer: enough to spread a round trip over.
_MOST_ENTRIES = 1024
#: Target size of an answer (bytes).
_ANSWER_BYTES = 4 * 1024 * 1024
#: Asked for while nothing is known: as many of the largest jobs as a host can well hold.
_FIRST_ENTRIES = 8


class ReadCount:
    """For one stream. Grows while entries are small; after a large one as many are asked for as fit."""

    def __init__(self) -> None:
        self.entries = _FIRST_ENTRIES

    def learn(self, answer: Sequence[Entry]) -> None:
        """Go by the largest entry of the newest answer: large jobs come in runs, and are not to be many."""
        largest = max(1, max([len(entry.data or b"") for entry in answer], default=1))
        self.entries = max(1, min(_MOST_ENTRIES, 2 * self.entries, _ANSWER_BYTES // largest))

    @property
    def largest(self) -> bool:
        """Whether jobs have been so small that it is as large as it gets."""
        return self.entries == _MOST_ENTRIES

    def overrun(self) -> None:
        """An answer was too large to be taken: one at a time until more is known."""
        self.entries = 1


log = logging.getLogger("jobworker.reader")

#: Pages of the pending list, at start and when other hosts' entries are taken over.
_PAGE = 256
#: Where a listing of pending entries starts and, for take-overs, ends.
_START = b"0-0"
#: Entries that are listed one by one in a turn: what is handed out is safe from the next end of a reader.
_ONE_BY_ONE = 8


class LeaseKeeper:
    """Of one reader, whose lanes and backlog are looked at; `on_entries` is told of what was found."""

    def __init__(
        self,
        store: ReaderStore,
        settings: Settings,
        workers: Sequence[WorkerHandle],
        buffer: PrefetchBuffer,
        tally: MetricsBuffer,
        on_entries: Callable[[int, list[Entry]], None],
        marks: Marks,
        mono_now_s: float,
    ) -> None:
        #: By source: how much to ask for at once.
        self.portions = [ReadCount() for _ in settings.streams]
        self._store = store
        self._settings = settings
        self._sources = settings.streams
        self._workers = workers
        self._buffer = buffer
        self._tally = tally
        self._on_entries = on_entries
        self._marks = marks
        self._mono_renewed_s = mono_now_s
        # Sources whose pending entries are still being listed, and the last one that was: new ones wait.
        self._unlisted: dict[int, bytes] = {}
        for source in settings.streams:  # start at 0, so that the first event is a rise that alerts see
            self._tally.count("z_novel_leases_taken_over_total", (source.stream,), 0)
            self._tally.count("z_novel_leases_lost_total", (source.stream,), 0)

    def credit(self) -> int:
        """How many jobs the workers can take; none while what waits here is as much as may be held."""
        return 0 if self._buffer.full else sum(worker.credit for worker in self._workers)

    # -- what this consumer was given before

    def begin(self) -> None:
        """List everything from the start, under a new connection."""
        self._unlisted = dict.fromkeys(range(len(self._sources)), _START)

    def dropped(self, source: int) -> None:
        """An answer was too large: list what it gave, an entry at a time until their size is known."""
        self.portions[source].overrun()
        self._unlisted[source] = _START

    def listed(self, source: int) -> bool:
        """Whether all that was pending is found; only then is anything new read."""
        return source not in self._unlisted

    def list_pending(self) -> None:
        """Continue the listing of entries that this consumer owns and no worker holds, while there is
        room."""
        if not self._unlisted or self._buffer.full:
            return
        known = self._in_hand()
        for number, after in list(self._unlisted.items()):
            if self._marks.is_careful(number):
                self._list_one_by_one(number, after, known)
                continue
            while not self._buffer.full:
                self._marks.open_window(number)
                page = self._store.own_pending(self._sources[number], after, self._page(number))
                if not page:
                    self._listed_all(number)
                    break
                self._on_entries(number, [entry for entry in page if (number, entry.id) not in known])
                after = self._unlisted[number] = page[-1].id
        self._marks.clear()

    def _listed_all(self, source: int) -> None:
        del self._unlisted[source]
        self._marks.survived(source)

    @property
    def listing_one_by_one(self) -> bool:
        """Whether such a listing is running and has room: the next turn continues without a wait."""
        return not self._buffer.full and any(map(self._marks.is_careful, self._unlisted))

    def _list_one_by_one(self, source: int, after: bytes, known: set[tuple[int, bytes]]) -> None:
        """A reader ended while it read these: each entry is fetched under its own mark. A few a turn, so
        that they are handed out although readers end."""
        ids = self._store.own_ids(self._sources[source], after, _ONE_BY_ONE)
        for id in ids:
            if self._buffer.full:
                return
            if (source, id) not in known:
                self._marks.mark(source, id)
                self._on_entries(source, self._fetch_one(source, after, id))
                self._marks.unmark()
                self._marks.absolve(source, id)
            after = self._unlisted[source] = id
        if not ids:
            self._listed_all(source)

    def _fetch_one(self, source: int, after: bytes, id: bytes) -> list[Entry]:
        """The entry behind ``after``; nothing where it was deleted from the stream."""
        if self._marks.convicted.get((source, id), 0) >= UNTOUCHABLE_AT:
            return [Entry(id, None)]
        return [entry for entry in self._store.own_pending(self._sources[source], after, 1) if entry.id == id]

    def _in_hand(self) -> set[tuple[int, bytes]]:
        """Every entry that a worker holds and that is not settled, or that waits here."""
        held = {(held.source, held.entry_id) for worker in self._workers for held in worker.table.unsettled()}
        return held | {(arrival.source, arrival.entry.id) for arrival in self._buffer}

    def _page(self, source: int) -> int:
        return min(_PAGE, self.portions[source].entries)

    # -- leases

    def renew_and_claim(self, now: float, *, draining: bool) -> None:
        """When a third of the lease is over: renew what is in hand, then take over what lost hosts left."""
        if now - self._mono_renewed_s <= self._settings.lease_s / 3:
            return
        self._mono_renewed_s = now
        known = self._in_hand()
        for number, source in enumerate(self._sources):
            mine = [entry_id for owner, entry_id in known if owner == number]
            lost = self._store.renew(source, mine) if mine else set()
            if lost:
                self._drop(number, lost)
            if not draining and not self._marks.is_careful(number):
                self._claim(number, known)

    def _drop(self, source: int, lost: set[bytes]) -> None:
        """Forget what waits here and was taken over elsewhere; what is running is refused when settled."""
        stream = self._sources[source].stream
        log.warning("lease.lost", extra={"entries": len(lost), "stream": stream})
        self._tally.count("z_novel_leases_lost_total", (stream,), len(lost))
        self._buffer.drop(source, lost)

    def _claim(self, source: int, known: set[tuple[int, bytes]]) -> None:
        cursor, stream = _START, self._sources[source].stream
        idle_ms = int(self._settings.lease_s * 1000)
        while self.credit() > self._buffer.waiting(source):
            page = self._page(source)
            self._marks.open_window(source)
            cursor, entries = self._store.claim(self._sources[source], idle_ms, page, cursor)
            found = [entry for entry in entries if (source, entry.id) not in known]
            if found:
                log.warning("lease.claimed", extra={"entries": len(found), "stream": stream})
                self._tally.count("z_novel_leases_taken_over_total", (stream,), len(found))
            self._on_entries(source, found)
            self._marks.clear()
            if cursor == _START:
                return

    def release_unstarted(self) -> None:
        """Before ending: let any other host have at once what was read and not begun, and the name itself."""
        try:
            for number, source in enumerate(self._sources):
                ids = [a.entry.id for a in self._buffer if a.source == number]
                if ids:
                    self._store.release(source, ids)
            self._store.release_name(self._sources)
        except (StoreUnavailable, Fenced) as error:
            log.warning("lease.release_failed", extra={"error": str(error)})
