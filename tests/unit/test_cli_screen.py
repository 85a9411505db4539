"""The page of ``jobworker top``: everything is on it, and nothing is wider than the terminal."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.admin.dead_letters import read_letter
from jobworker.worker.admin.overview import Overview, OverviewPoller
from jobworker.worker.admin.status_client import Service, fetch_status, same_store
from jobworker.worker.admin.words import columns, pad, strip_control
from jobworker.worker.cli.screen import lines
from jobworker.worker.keys import Source
from jobworker.worker.store.operator import Pause
from jobworker.worker.store.ports import Depths, Entry

S = Source("stream:story:gen", "cg-gen-worker")


def said(done: float, pid: int = 1, instance: str = "blue") -> dict[str, Any]:
    running = {
        "for_s": 12.5, "limit_in_s": 40.0, "count": 2,
        "jobs": [{"stream": S.stream, "entry_id": "5-0", "type": "embedding_batch", "deaths": 0}],
    }  # fmt: skip
    worker = {"role": "worker", "slot": 0, "pid": 77, "state": "busy", "rss_mib": 812, "finished": 4711,
              "restarts": 3, "running": running}  # fmt: skip
    counted = [{"task_type": "embedding_batch", "value": done}]
    return {
        "host": "h", "instance": instance, "pid": pid, "types": ["embedding_batch"],
        "children": [{"role": "reader", "state": "running"}, worker],
        "metrics": {"z_novel_jobs_completed_total": counted}, "reasons": [],
    }  # fmt: skip


def look() -> Overview:
    letter = b'{"task":{"id":"j9","type":"audit"},"reason":"poison","error":"WorkerDied: SIGKILL"}'
    return Overview(
        wall_s=2000.0,
        streams=[(S, Depths(312, 8, 2, 5, 90.0, 312))],
        services=[Service("http://a", said(100)), Service("http://b", {}, "refused")],
        totals={"embedding_batch": {"done": 100.0, "failed": 0, "retried": 0, "dead": 0}},
        rates={"embedding_batch": {"done": 31.25, "failed": 0.5, "retried": 0, "dead": 0}},
        pauses=[Pause("audit", 1000.0, "disk full")],
        letters=[read_letter(S.stream, Entry(b"1940000-0", letter))],
        names={(S.stream, "5-0"): "job-1"},
    )


def test_everything_is_on_80_columns() -> None:
    # The page leaves the last column of the terminal empty.
    page = [line.text for line in lines(look(), 79)]
    text = "\n".join(page)
    for wanted in (
        "312", "31 jobs/s", "31.2", "embedding_ba… job-1", "blue/0", "812", "4711", "12 s", "poison",
        "1 service, 1 worker (1 busy)", "WorkerDied", "audit is paused", "disk full", "http://b: refused",
        "60 s",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert not [line for line in page[1:] if line.endswith("…") and "WorkerDied" not in line]
    assert len(page) <= 22, "on a terminal of 24 lines nothing of this is out of sight"


@given(st.text(max_size=300), st.integers(10, 120))
def test_no_line_is_wider_than_the_terminal_whatever_tenants_write(text: str, width: int) -> None:
    seen = look()
    seen.names[S.stream, "5-0"] = text
    seen.pauses = [Pause(text, 1000.0, text)]
    seen.trouble = text
    seen.letters = [read_letter(S.stream, Entry(b"1-0", None))]
    for line in lines(seen, width):
        assert columns(line.text) <= width
        assert "\x1b" not in line.text


@given(st.text(max_size=50), st.integers(1, 40))
def test_cut_text_fills_no_more_than_its_width(text: str, width: int) -> None:
    cut = strip_control(text, width)
    assert columns(cut) <= width
    assert cut == strip_control(text) or cut.endswith("…")


@pytest.mark.parametrize(
    ("text", "width", "padded"), [("ab", 4, "ab  "), ("ab", -4, "  ab"), ("长", 4, "长  ")]
)
def test_padding_goes_by_columns(text: str, width: int, padded: str) -> None:
    assert pad(text, width) == padded


class FakeStore:
    """Answers as an empty store does."""

    def depths(self, source: Source) -> Depths:
        return Depths(0, 0, 0, 0, 0.0, 0)

    def pauses(self) -> list[Pause]:
        return []

    def wall_now_s(self, stream: str) -> float:
        return 0.0

    def dead_before(self, stream: str, before: bytes, count: int) -> list[Entry]:
        return []

    def entry(self, stream: str, id: bytes) -> None:
        return None


def test_rates_come_from_what_the_same_process_says_twice() -> None:
    answers = [
        [Service("http://a", said(100)), Service("http://b", said(50, pid=2))],
        [Service("http://a", said(130)), Service("http://b", said(7, pid=3))],
        [Service("http://a", {}, "refused"), Service("http://b", said(27, pid=3))],
    ]
    clock = iter([10.0, 20.0, 30.0])
    store: Any = FakeStore()
    watcher = OverviewPoller(store, store, [S], lambda: answers.pop(0), mono_s=lambda: next(clock))
    assert watcher.look().rates is None
    second = watcher.look()
    assert second.rates is not None
    assert second.rates["embedding_batch"]["done"] == 3.0, "a restarted service counts from nothing"
    assert second.totals["embedding_batch"]["done"] == 137
    assert watcher.look().rate("done") == 2.0, "a silent one has no rate"


def test_a_page_that_is_no_status_page_is_a_silent_service() -> None:
    assert fetch_status("http://127.0.0.1:1").trouble.startswith("ConnectionRefusedError")


@pytest.mark.parametrize(
    ("theirs", "ours", "same"),
    [
        ("redis://:***@127.0.0.1:6379/0", "redis://:pa@ss@localhost:6379", True),
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/1", False),
        ("redis://a:6379/0", "redis://b:6379/0", False),
        ("unix:///run/r.sock", "unix:///run/r.sock?db=0", True),
        ("redis+sentinel://h:1,i:2/mymaster/0", "redis+sentinel://u:p@h:1,i:2/mymaster", True),
    ],
)
def test_a_service_on_another_store_is_told_apart(theirs: str, ours: str, same: bool) -> None:
    assert same_store(theirs, ours) is same
