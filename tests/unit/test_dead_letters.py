"""Dead letters: pages over several streams, filters, and bulk operations."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.admin.dead_letters import (
    BulkOperation,
    Cursor,
    DeadLetterQueue,
    LetterFilter,
    SelectedLetters,
    read_letter,
)
from jobworker.worker.store.operator import order_of
from jobworker.worker.store.ports import Entry
from support.fake_operator import FakeOperatorStore, letter

STREAMS = ["a", "b", "c"]
POISON = LetterFilter(reasons=frozenset({"poison"}))


def queue(letters: dict[str, list[Entry]], letter_filter: LetterFilter | None = None) -> DeadLetterQueue:
    store: Any = FakeOperatorStore(letters)
    return DeadLetterQueue(store, STREAMS, letter_filter or LetterFilter())


_ids = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), unique=True, max_size=12)
_reasons = st.sampled_from(["poison", "timeout"])


@given(
    ids=st.fixed_dictionaries(dict.fromkeys(STREAMS, _ids)),
    data=st.data(),
    size=st.integers(1, 5),
    scan_limit=st.integers(1, 7),
)
def test_pages_show_every_matching_letter_once_newest_first(
    ids: dict[str, list[tuple[int, int]]], data: st.DataObject, size: int, scan_limit: int
) -> None:
    letters = {
        stream: [letter(f"{ms}-{sequence}", data.draw(_reasons)) for ms, sequence in some]
        for stream, some in ids.items()
    }
    letter_queue = queue(letters, POISON)
    shown, cursor = [], None
    for _ in range(100):
        page = letter_queue.page(size, scan_limit, cursor)
        assert len(page.letters) <= size
        assert page.scanned <= scan_limit
        shown += page.letters
        cursor = page.next_cursor
        if cursor is None:
            break
    matching = [(s, e.id) for s, entries in letters.items() for e in entries if b"poison" in (e.data or b"")]
    assert cursor is None
    assert sorted((one.stream, one.id) for one in shown) == sorted(matching)
    orders = [order_of(one.id) for one in shown]
    assert orders == sorted(orders, reverse=True)
    assert [(x.stream, x.id) for x in letter_queue.newest_first()] == [(x.stream, x.id) for x in shown]


def test_limits_on_age_bound_the_scan() -> None:
    letters = {"a": [letter(f"{second}000-0") for second in range(1, 10)]}
    page = queue(letters, LetterFilter().with_ages(9.0, 2.0, 5.0)).page(100, 100)
    assert [one.wall_s for one in page.letters] == [7, 6, 5, 4]
    assert page.scanned == 4


def test_a_letter_is_read_by_its_cursor() -> None:
    letter_queue = queue({"a": [letter("1-0"), letter("1-2")]})
    assert letter_queue.get(Cursor("a", b"1-2")) is not None
    assert letter_queue.get(Cursor("a", b"1-1")) is None
    assert letter_queue.get(Cursor("b", b"1-2")) is None


def test_a_bulk_operation_processes_each_matching_letter_and_counts() -> None:
    letters = {
        "a": [letter("1-0"), letter("2-0", job_id=None), letter("3-0", "timeout")],
        "b": [letter("1-0")],
    }
    letter_queue = queue(letters, POISON)
    store: Any = letter_queue.store
    scanned: list[int] = []
    skipped: list[bytes] = []
    operation = BulkOperation(letter_queue)
    operation.requeue(on_scanned=scanned.append, on_skipped=lambda one: skipped.append(one.id))
    assert (operation.done, operation.skipped, skipped, sum(scanned)) == (2, 1, [b"2-0"], 4)
    assert store.requeued == [("a", b"1-0"), ("b", b"1-0")]
    dry_run = BulkOperation(letter_queue, dry_run=True)
    dry_run.purge()
    assert (dry_run.done, letter_queue.count()) == (3, 4)
    BulkOperation(letter_queue).purge()
    assert letter_queue.count() == 1


def test_letters_that_disappear_during_an_operation_are_counted_as_gone() -> None:
    class Vanishing(FakeOperatorStore):
        def dead_after(self, stream: str, after: bytes, count: int) -> list[Entry]:
            page = super().dead_after(stream, after, count)
            self.letters[stream] = [one for one in self.letters[stream] if one.id != b"1-0"]
            return page

    for run in (BulkOperation.requeue, BulkOperation.purge):
        store: Any = Vanishing({"a": [letter("1-0"), letter("2-0")]})
        operation = BulkOperation(DeadLetterQueue(store, ["a"], LetterFilter()))
        run(operation)
        assert (operation.done, operation.gone) == (1, 1)


def test_a_requeued_job_that_fails_again_is_not_requeued_by_the_same_operation() -> None:
    class FailingAgain(FakeOperatorStore):
        def requeue(self, stream: str, jobs: Any, to: str = "") -> list[bool]:
            self.letters[stream] += [letter(f"{9 + len(self.requeued)}-0")]
            return super().requeue(stream, jobs, to)

    store: Any = FailingAgain({"a": [letter("1-0"), letter("2-0")]})
    operation = BulkOperation(DeadLetterQueue(store, ["a"], LetterFilter()))
    operation.requeue(iter([1, 1, 1]))
    assert (operation.done, store.requeued) == (2, [("a", b"1-0"), ("a", b"2-0")])


def test_selected_letters_are_processed_and_no_others() -> None:
    store: Any = FakeOperatorStore({"a": [letter(f"{n}-0") for n in range(1, 5)], "b": [letter("1-0")]})
    selected = SelectedLetters(store, [Cursor("b", b"1-0"), Cursor("a", b"3-0"), Cursor("a", b"9-0")])
    operation = BulkOperation(selected)
    operation.purge()
    assert (operation.done, selected.count()) == (2, 3)
    assert [one.id for one in store.letters["a"]] == [b"1-0", b"2-0", b"4-0"]
    assert store.letters["b"] == []


@pytest.mark.parametrize("data", [None, b"", b"[]", b"no json", b'{"retry_count": "x"}', b"[" * 100_000])
def test_an_invalid_letter_is_shown_with_an_error(data: bytes | None) -> None:
    one = read_letter("a", Entry(b"1-0", data))
    assert (one.task, one.error.partition(":")[0]) == (None, "not a dead letter")


def test_a_job_with_invalid_counters_keeps_its_names_and_can_be_requeued() -> None:
    one = read_letter("a", Entry(b"1-0", b'{"task": {"id": "j", "type": "audit", "deaths": "x"}}'))
    assert (one.job_id, one.task is not None) == ("j", True)


def malformed(data: bytes) -> Entry:
    raw = base64.b64encode(data).decode()
    return Entry(b"1-0", json.dumps({"task": None, "reason": "malformed", "raw": raw}).encode())


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b'{"id": "j", "type": "wc", "tenant_id": "t1", "timeout": "soon"}', ("j", "wc", "t1")),
        (b'{"payload": {"id": "inner"}, "id": "j", "type": 7, "tenant_id": "t1"}', ("j", "", "t1")),
        (b' {"type":"wc" ,\n"id" : "j","payload": {"text": "cut of', ("j", "wc", "")),
        (b'{"id":"j","type":"wc","payload":' + b"[" * 50_000, ("j", "wc", "")),
        (b'{"id":"j","type":"wc","payload":' + b"1" * 20_000 + b"}", ("j", "wc", "")),
        (b'{"id":"j","id":"k","type":"wc"}', ("", "wc", "")),
        (b'{"id":"' + b"j" * 513 + b'","type":"wc"}', ("", "wc", "")),
        (b'{"id":"j\xff","type":"\\ud800","tenant_id":"t1"}', ("", "", "t1")),
        (b'["id", "j"]', ("", "", "")),
        (b"no json", ("", "", "")),
        (b'{"id": "j", ["type"]: "wc"}', ("j", "", "")),
        (b"", ("", "", "")),
    ],
)
def test_a_malformed_job_is_identified_as_far_as_its_names_are_valid(
    data: bytes, names: tuple[str, str, str]
) -> None:
    letter = read_letter("a", malformed(data))
    assert (letter.job_id, letter.type, letter.tenant_id) == names
    assert letter.task is None, "it cannot be requeued"


def test_damaged_base64_hides_nothing_else() -> None:
    entry = Entry(b"1-0", json.dumps({"reason": "malformed", "raw": "A", "error": "e"}).encode())
    assert read_letter("a", entry).error == "e"


@pytest.mark.parametrize(
    ("raw", "readable"),
    [
        (b'{"id": "r", "type": "audit", "payload": {"n": 1}}', True),
        (b'{"id": "r", "type": "audit", "payload": {"n"', False),
        (b'{"id": "r", "type": "audit", "id": "s"}', False),
        (b'{"type": "audit"}', False),
        (b"\xff", False),
    ],
)
def test_a_job_that_stands_only_in_raw_is_requeued_if_it_is_valid(raw: bytes, readable: bool) -> None:
    encoded = base64.b64encode(raw).decode()
    letter_queue = queue({"a": [letter("1-0", job_id=None, raw=encoded)]})
    operation = BulkOperation(letter_queue)
    operation.requeue()
    assert (operation.done, operation.skipped) == ((1, 0) if readable else (0, 1))
    assert read_letter("a", letter("1-0", job_id=None, raw=encoded)).task == (raw if readable else None)


def test_bytes_in_raw_that_are_no_base64_are_no_job() -> None:
    assert read_letter("a", letter("1-0", job_id=None, raw="{}é")).task is None
