"""The page of ``jobworker top``: complete, and no line is wider than the terminal."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.admin.dead_letters import read_letter
from jobworker.worker.admin.limits import LimitState
from jobworker.worker.admin.overview import Overview
from jobworker.worker.admin.status_client import Service
from jobworker.worker.admin.words import columns
from jobworker.worker.cli.screen import lines
from jobworker.worker.flow import Limit
from jobworker.worker.keys import Source
from jobworker.worker.store.operator import LaneCounts, Pause
from jobworker.worker.store.ports import Depths, Entry

S = Source("stream:story:gen", "cg-gen-worker")


def status() -> dict[str, Any]:
    running = {
        "for_s": 12.5, "limit_in_s": 40.0, "count": 2,
        "jobs": [{"stream": S.stream, "entry_id": "5-0", "type": "embedding_batch", "deaths": 0}],
    }  # fmt: skip
    worker = {"role": "worker", "slot": 0, "pid": 77, "state": "busy", "rss_mib": 812, "finished": 4711,
              "restarts": 3, "running": running}  # fmt: skip
    return {
        "host": "h", "instance": "blue", "pid": 1, "types": ["embedding_batch"],
        "children": [{"role": "reader", "state": "running"}, worker],
        "metrics": {}, "reasons": [],
    }  # fmt: skip


def snapshot() -> Overview:
    letter = b'{"task":{"id":"j9","type":"audit"},"reason":"poison","error":"WorkerDied: SIGKILL"}'
    return Overview(
        wall_s=2000.0,
        streams=[(S, Depths(312, 8, 2, 5, 90.0, 312))],
        services=[Service("http://a", status()), Service("http://b", {}, "refused")],
        totals={"embedding_batch": {"done": 100.0, "failed": 0, "retried": 0, "dead": 0}},
        rates={"embedding_batch": {"done": 31.25, "failed": 0.5, "retried": 0, "dead": 0}},
        pauses=[Pause("audit", 1000.0, "disk full")],
        letters=[read_letter(S.stream, Entry(b"1940000-0", letter))],
        job_ids={(S.stream, "5-0"): "job-1"},
    )


def test_everything_is_on_80_columns() -> None:
    # curses cannot write into the last column of the terminal.
    page = [line.text for line in lines(snapshot(), 79)]
    text = "\n".join(page)
    for wanted in (
        "312", "31 jobs/s", "31.2", "embedding_ba… job-1", "blue/0", "812", "4711", "12 s", "poison",
        "1 service, 1 worker (1 busy)", "WorkerDied", "audit is paused", "disk full", "http://b: refused",
        "60 s",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert not [line for line in page[1:] if line.endswith("…") and "WorkerDied" not in line]
    assert len(page) <= 22, "all of it fits a terminal of 24 lines"


def test_sorted_jobs_and_limits_are_shown() -> None:
    overview = snapshot()
    overview.streams = [(S, Depths(312, 8, 2, 5, 90.0, 12, 300, (), {"t1": 75.0}))]
    overview.lanes = {S.stream: LaneCounts(300, {9: 10, 5: 290}, {"t1": 299, "": 1}, {}, {})}
    limit = Limit("audit/tenant", "audit", "tenant", concurrency=4, starts=100, per_ms=60_000)
    overview.limits = [LimitState(S.stream, limit, 3, 250, {})]
    rows = [line.text.split() for line in lines(overview, 79)]
    assert ["t1", "299", "75", "s"] in rows
    assert ["no", "tenant", "1", "-"] in rows
    assert ["all", "300", "by", "priority", "9:", "10,", "5:", "290"] in rows
    assert ["audit/tenant", "4", "100/min", "3", "250"] in rows


def test_problems_of_a_service_and_open_circuits_are_at_the_top_of_80_columns() -> None:
    overview = snapshot()
    overview.services[0].status["reasons"] = ["worker 1 is starting", "reader is down"]
    overview.services[0].status["transient_reasons"] = ["worker 1 is starting"]
    gauge = {"z_novel_circuit_open": [{"task_type": "embedding_batch", "value": 1}]}
    overview.services[0].status["metrics"] = gauge
    top = [line for line in lines(overview, 79)[:5] if line.style == "bad"]
    assert [line.text for line in top] == [
        "h/blue: reader is down",
        "embedding_batch: circuit open, its dependency does not answer",
        "audit is paused for 17 min: disk full",
    ]


@given(st.text(max_size=300), st.integers(10, 120))
def test_no_line_is_wider_than_the_terminal_whatever_tenants_write(text: str, width: int) -> None:
    overview = snapshot()
    overview.job_ids[S.stream, "5-0"] = text
    overview.pauses = [Pause(text, 1000.0, text)]
    overview.error = text
    overview.letters = [read_letter(S.stream, Entry(b"1-0", None))]
    for line in lines(overview, width):
        assert columns(line.text) <= width
        assert "\x1b" not in line.text
