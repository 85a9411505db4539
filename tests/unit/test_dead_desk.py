"""Going through dead letters by pages, over several streams at once."""

import json

from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.admin.dead_letters import (
    BulkOperation,
    Cursor,
    DeadLetterQueue,
    LetterFilter,
    SelectedLetters,
    aged,
)
from jobworker.worker.store.operator import START, order_of
from jobworker.worker.store.ports import Entry

STREAMS = ["a", "b", "c"]


class Letters:
    """As much of an operator's store as a desk asks, in memory; ids are unique in their stream only."""

    def __init__(self, letters: dict[str, list[Entry]]) -> None:
        self.letters = {
            stream: sorted(kept, key=lambda one: order_of(one.id)) for stream, kept in letters.items()
        }
        self.requeued: list[tuple[str, bytes]] = []

    def dead_count(self, stream: str) -> int:
        return len(self.letters.get(stream, []))

    def dead_before(self, stream: str, before: bytes, count: int) -> list[Entry]:
        kept = reversed(self.letters.get(stream, []))
        return [one for one in kept if before == START or order_of(one.id) < order_of(before)][:count]

    def dead_after(self, stream: str, after: bytes, count: int) -> list[Entry]:
        return [one for one in self.letters.get(stream, []) if order_of(one.id) > order_of(after)][:count]

    def requeue(self, stream: str, jobs: list[tuple[bytes, bytes]]) -> list[bool]:
        there = {one.id for one in self.letters[stream]}
        self.requeued += [(stream, id) for id, _ in jobs if id in there]
        return [id in there for id, _ in jobs]

    def purge(self, stream: str, ids: list[bytes]) -> int:
        before = self.letters[stream]
        self.letters[stream] = [one for one in before if one.id not in ids]
        return len(before) - len(self.letters[stream])


def entry(id: str, reason: str = "poison", job: str | None = "j") -> Entry:
    task = {"id": job, "type": "audit"} if job else None
    return Entry(id.encode(), json.dumps({"task": task, "reason": reason}).encode())


def desk(letters: dict[str, list[Entry]], choice: LetterFilter | None = None) -> DeadLetterQueue:
    return DeadLetterQueue(Letters(letters), STREAMS, choice or LetterFilter())  # type: ignore[arg-type]


_ids = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), unique=True, max_size=12)
_reasons = st.sampled_from(["poison", "timeout"])


@given(
    ids=st.fixed_dictionaries(dict.fromkeys(STREAMS, _ids)),
    data=st.data(),
    size=st.integers(1, 5),
    look_at=st.integers(1, 7),
)
def test_pages_hold_every_chosen_letter_once_newest_first(
    ids: dict[str, list[tuple[int, int]]], data: st.DataObject, size: int, look_at: int
) -> None:
    letters = {
        stream: [entry(f"{ms}-{sequence}", data.draw(_reasons)) for ms, sequence in some]
        for stream, some in ids.items()
    }
    one = desk(letters, LetterFilter(reasons=frozenset({"poison"})))
    found, behind = [], None
    for _ in range(100):
        page = one.page(size, look_at, behind)
        assert len(page.letters) <= size
        assert page.looked_at <= look_at
        found += page.letters
        behind = page.behind
        if behind is None:
            break
    chosen = [(s, e.id) for s, kept in letters.items() for e in kept if b"poison" in (e.data or b"")]
    assert behind is None
    assert sorted((letter.stream, letter.id) for letter in found) == sorted(chosen)
    orders = [order_of(letter.id) for letter in found]
    assert orders == sorted(orders, reverse=True)
    assert [(x.stream, x.id) for x in one.newest_first()] == [(x.stream, x.id) for x in found]


def test_ages_bound_what_is_looked_at() -> None:
    letters = {"a": [entry(f"{second}000-0") for second in range(1, 10)]}
    one = desk(letters, aged(LetterFilter(), 9.0, 2.0, 5.0))
    page = one.page(100, 100)
    assert [letter.wall_s for letter in page.letters] == [7, 6, 5, 4]
    assert page.looked_at == 4


def test_a_letter_is_found_by_its_place() -> None:
    one = desk({"a": [entry("1-0"), entry("1-2")]})
    assert one.letter(Cursor("a", b"1-2")) is not None
    assert one.letter(Cursor("a", b"1-1")) is None
    assert one.letter(Cursor("b", b"1-2")) is None


def test_an_errand_does_it_to_each_chosen_one_and_counts() -> None:
    letters = {"a": [entry("1-0"), entry("2-0", job=None), entry("3-0", "timeout")], "b": [entry("1-0")]}
    one = desk(letters, LetterFilter(reasons=frozenset({"poison"})))
    seen: list[int] = []
    skipped: list[bytes] = []
    errand = BulkOperation(one)
    errand.requeue(seen=seen.append, skipped=lambda letter: skipped.append(letter.id))
    assert (errand.done, errand.skipped, skipped, sum(seen)) == (2, 1, [b"2-0"], 4)
    assert one.store.requeued == [("a", b"1-0"), ("b", b"1-0")]  # type: ignore[attr-defined]
    dry = BulkOperation(one, dry_run=True)
    dry.purge()
    assert (dry.done, one.count()) == (3, 4)
    BulkOperation(one).purge()
    assert one.count() == 1


def test_letters_that_were_pointed_at_are_dealt_with_and_no_others() -> None:
    store = Letters({"a": [entry(f"{n}-0") for n in range(1, 5)], "b": [entry("1-0")]})
    picked = SelectedLetters(store, [Cursor("b", b"1-0"), Cursor("a", b"3-0"), Cursor("a", b"9-0")])  # type: ignore[arg-type]
    errand = BulkOperation(picked)
    errand.purge()
    assert (errand.done, picked.count()) == (2, 3)
    assert [one.id for one in store.letters["a"]] == [b"1-0", b"2-0", b"4-0"]
    assert store.letters["b"] == []
