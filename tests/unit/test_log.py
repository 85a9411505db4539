"""Log lines: one JSON object an event, whatever is in it, and never a password."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobworker.handlers.settings import HandlerSettings
from jobworker.worker import Job
from jobworker.worker.telemetry import log as logs
from jobworker.worker.telemetry.current_job import current, log_fields
from jobworker.worker.telemetry.log import ForPeople, JsonLines, hide, redacted, secrets_of
from jobworker.worker.telemetry.log_limit import RateLimitFilter

SECRET = "s3cr3t"
#: Libraries whose level is set too.
NOISY = ("httpx", "sentence_transformers", "urllib3", "pymilvus")


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        (f"redis://:{SECRET}@host:6379/0", "redis://:***@host:6379/0"),
        (f"rediss://user:{SECRET}@host:6379/0", "rediss://user:***@host:6379/0"),
        (
            f"redis+sentinel://u:{SECRET}@a:26379,b:26379/master/0",
            "redis+sentinel://u:***@a:26379,b:26379/master/0",
        ),
        (f"redis+cluster://:{SECRET}@[::1]:7000", "redis+cluster://:***@[::1]:7000"),
        (f"unix://u:{SECRET}@/run/redis.sock", "unix://u:***@/run/redis.sock"),
        (f"https://u:{SECRET}@milvus:19530", "https://u:***@milvus:19530"),
        (f"cannot reach redis://u:{SECRET}@h:1 (timed out)", "cannot reach redis://u:***@h:1 (timed out)"),
        (f"redis://u:{SECRET}@a and redis://:{SECRET}@b", "redis://u:***@a and redis://:***@b"),
        (f"redis://u:{SECRET}@{SECRET}@host", "redis://u:***@host"),
        (f"a://b://u:{SECRET}@host", "a://b:***@host"),
        (f"a://:@ b://u:@ redis://u:{SECRET}@host", "a://:@ b://u:@ redis://u:***@host"),
        (f"://u:x@h redis://u:{SECRET}@h\nredis://h:1/@", "://u:x@h redis://u:***@h\nredis://h:***@"),
        (f"redis://u:%40{SECRET}:/?#{SECRET}@host", "redis://u:***@host"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("http://127.0.0.1:9464/metrics", "http://127.0.0.1:9464/metrics"),
        (f"host=db password={SECRET} user=u", "host=db password=*** user=u"),
        (f"{{'Authorization': 'Bearer {SECRET}-9f'}}", "{'Authorization': 'Bearer ***'}"),
        ("mail a@b.c about http://x:80 now", "mail a@b.c about http://x:80 now"),
    ],
)
def test_passwords_in_urls_are_replaced(text: str, safe: str) -> None:
    assert redacted(text) == safe


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What was sent to stderr since the last call; the loggers are as before afterwards."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in (None, *NOISY)}
    yield lambda: capsys.readouterr().err
    root.handlers[:] = handlers
    hide(())
    current.jobs = ()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_an_event_is_one_json_line_with_its_fields(said: Callable[[], str]) -> None:
    logs.set_up("worker 3", "info", "json")
    logging.getLogger("jobworker.x").warning("第 %d 章", 7, extra={"job_id": "a\nb", "deaths": 2})
    (line,) = said().splitlines()
    event = json.loads(line)
    assert event.pop("timestamp").endswith("+00:00")
    assert event == {
        "level": "warning", "msg": "第 7 章", "service": "jobworker", "role": "worker 3",
        "job_id": "a\nb", "deaths": 2,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_way_into_a_line_lets_a_password_through(said: Callable[[], str], form: str) -> None:
    """In the message, an argument, a field, a nested field, an exception and its traceback."""
    logs.set_up("reader", "info", form)
    log = logging.getLogger("jobworker.x")
    url = f"redis://user:{SECRET}@host:6379/0"
    try:
        raise ConnectionError(f"cannot reach {url}")
    except ConnectionError:
        log.exception("lost %s", url, extra={"url": url, "settings": {"redis_url": url, "more": [url]}})
    line = said()
    assert SECRET not in line
    assert line.count("***@host") >= 5


def test_a_traceback_is_in_the_same_json_line(said: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "json")
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("jobworker.x").exception("failed")
    (line,) = said().splitlines()
    assert "ValueError: no" in json.loads(line)["exception"]


def test_what_is_no_json_is_written_as_text(said: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "json")
    logging.getLogger("jobworker.x").info("read", extra={"id": b"1-1", "kinds": {1}})
    assert json.loads(said())["id"] == "b'1-1'"


def test_a_line_for_people(said: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "text")
    logging.getLogger("jobworker.x").warning("lease lost", extra={"entries": 3})
    assert said().rstrip().endswith("warning reader: lease lost entries=3")


def test_the_level_holds_for_all_and_libraries_are_quiet(said: Callable[[], str]) -> None:
    logs.set_up("reader", "warning", "json")
    logging.getLogger("jobworker.x").info("not worth it")
    logging.getLogger("urllib3").warning("chatter")
    assert said() == ""


def test_a_line_that_cannot_be_written_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    """A full disk under the log must not stop the settling of jobs."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    logs.set_up("reader", "info", "json")
    logging.getLogger("jobworker.x").error("lost")


@pytest.mark.parametrize("formatter", [JsonLines("r"), ForPeople("r")])
def test_a_record_is_not_changed_by_being_written(formatter: logging.Formatter) -> None:
    record = logging.makeLogRecord({"msg": "a %s", "args": ("b",), "levelname": "INFO", "extra_field": 1})
    assert formatter.format(record) == formatter.format(record)


KEY, TOKEN = 'sk-"quoted\\key', "root:Mil/v us"
SERVICE = HandlerSettings(
    redis_url="redis://:p%40ssw0rd@h:6379", milvus_token=TOKEN, postgres_dsn="host=db password=under-ground"
)


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(
    "secret", ["p@ssw0rd", "p%40ssw0rd", TOKEN, "Mil/v us", "under-ground", KEY, "h3ader-value"]
)
def test_the_services_own_secrets_are_replaced_wherever_they_stand(
    said: Callable[[], str], form: str, secret: str
) -> None:
    environment = {"JOBWORKER_LLM_KEY": KEY, "OTEL_EXPORTER_OTLP_HEADERS": "a=1,api-key=h3ader-value"}
    hide(secrets_of(SERVICE, environment))
    logs.set_up("reader", "info", form)
    try:
        raise ConnectionError(f"refused {secret}!")
    except ConnectionError:
        extra = {"tried": secret, "more": {"deep": [f"a{secret}b"]}, "other": SimpleNamespace(key=secret)}
        logging.getLogger("jobworker.x").exception("at %s", secret, extra=extra)
    line = said()
    text = json.dumps(json.loads(line), ensure_ascii=False) if form == "json" else line
    for way in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]):
        assert way not in text
    assert "ConnectionError: refused ***!" in text


def test_a_key_in_a_file_is_a_secret_and_a_file_that_is_missing_is_none(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-from-a-file\n")
    assert "sk-from-a-file" in secrets_of(HandlerSettings(llm_key_file=str(tmp_path / "key")), {})
    assert secrets_of(
        HandlerSettings(llm_key_file=str(tmp_path / "none")), {"PATH": "/bin", "A_KEY": "x"}
    ) == {""}


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_line_about_a_huge_job_is_bounded_and_holds_no_part_of_a_password(
    said: Callable[[], str], form: str
) -> None:
    """What is cut is cut behind the redaction: half a password would not be known for one."""
    logs.set_up("worker 0", "info", form)
    huge = "x" * (logs.MAX_TEXT_CHARS // 2 - 20) + f" redis://u:{SECRET * 20}@host " + "y" * 1_000_000
    current.jobs = a_job(huge, metadata={"request_id": huge})
    try:
        raise ValueError(huge)
    except ValueError:
        extra = {"many": [huge] * 1000, "tree": {huge: huge}, "error": huge}
        logging.getLogger("theirs").exception("stored %s", huge, extra=extra)
    line = said()
    assert SECRET not in line
    assert len(line) < 100 * logs.MAX_TEXT_CHARS
    assert "ValueError" in line
    assert "936 items" in line


def test_words_that_a_short_password_is_part_of_stay_readable(said: Callable[[], str]) -> None:
    hide(secrets_of(HandlerSettings(redis_url="redis://:read@h:1"), {}))
    logs.set_up("reader", "info", "json")
    logging.getLogger("jobworker.x").info("reading redis://:read@h:1")
    assert json.loads(said())["msg"] == "reading redis://:***@h:1"


def a_job(id: str, **more: Any) -> Job:
    fields = {"type": "noop", "tenant_id": "t1", "project_id": "p1", "payload": None, "metadata": {},
              "created_at": "", "stream": "s", "entry_id": "1-1", "retry_count": 0}  # fmt: skip
    return Job(id=id, **(fields | more))


def test_what_a_handler_says_carries_its_job(said: Callable[[], str]) -> None:
    logs.set_up("worker 0", "info", "json")
    metadata = {"request_id": "r1", "trace_id": "t-9", "priority": "5"}
    current.jobs = a_job("j1", metadata=metadata)
    logging.getLogger("theirs").info("stored")
    event = json.loads(said())
    told = {"job_id": "j1", "task_type": "noop", "tenant_id": "t1", "project_id": "p1",
            "request_id": "r1", "trace_id": "t-9"}  # fmt: skip
    assert told.items() <= event.items()
    assert "priority" not in event
    logging.getLogger("theirs").info("stored", extra={"job_id": "its own"})
    assert json.loads(said())["job_id"] == "its own"


def test_what_a_handler_says_of_a_batch_carries_what_its_jobs_have_in_common(said: Callable[[], str]) -> None:
    logs.set_up("worker 0", "info", "json")
    current.jobs = [a_job("j1", project_id="p1"), a_job("j2", project_id="p2"), a_job("j3", tenant_id="t1")]
    logging.getLogger("theirs").info("stored")
    event = json.loads(said())
    assert (event["jobs"], event["task_type"], event["tenant_id"]) == (3, "noop", "t1")
    assert "job_id" not in event
    assert "project_id" not in event


def test_a_traceparent_names_the_trace() -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    metadata = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    assert log_fields(a_job("j", metadata=metadata))["trace_id"] == trace
    assert "trace_id" not in log_fields(a_job("j", metadata={"traceparent": "nonsense"}))
    assert "tenant_id" not in log_fields(a_job("j", tenant_id=""))


class Clock:
    """Time that the test moves, and calls that wait for it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waiting: list[tuple[float, Callable[[], None]]] = []

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.waiting.append((self.now + delay_s, call))


def record_of(msg: str, level: int = logging.WARNING, **extra: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "n", "msg": msg, "levelno": level, **extra})


def test_repeats_are_counted_and_said_at_the_end_of_the_time() -> None:
    clock, summaries = Clock(), []
    repeats = RateLimitFilter(
        summaries.append, most=3, within_s=10, mono_s=lambda: clock.now, later=clock.later
    )
    passed = [repeats.filter(record_of("retried %s", task_type="embed", args=(i,))) for i in range(50)]
    assert passed == [True] * 3 + [False] * 47
    assert repeats.filter(record_of("retried %s", task_type="audit")), "another type of job"
    assert repeats.filter(record_of("dead")), "another event"
    assert repeats.filter(record_of("retried %s", logging.ERROR, task_type="embed")), "another level"
    assert all(repeats.filter(record_of("end", logging.CRITICAL)) for _ in range(9))
    assert not summaries
    ((due, call),) = clock.waiting
    assert due == 110.0
    clock.now = due
    call()
    (summary,) = summaries
    told = {
        "msg": "log.suppressed",
        "event": "retried %s",
        "times": 47,
        "task_type": "embed",
        "levelno": logging.WARNING,
    }
    assert told.items() <= vars(summary).items()
    assert repeats.filter(record_of("retried %s", task_type="embed")), "the count starts again"


def test_what_was_held_back_is_said_when_the_next_line_comes_late_or_at_the_end() -> None:
    clock, summaries = Clock(), []
    repeats = RateLimitFilter(
        summaries.append, most=1, within_s=10, mono_s=lambda: clock.now, later=lambda *_: None
    )
    for _ in range(3):
        repeats.filter(record_of("a"))
    clock.now += 11
    assert repeats.filter(record_of("b"))
    repeats.filter(record_of("b"))
    repeats.close()
    assert [(s.event, s.times) for s in summaries] == [("a", 2), ("b", 1)]


def test_a_flood_is_cut_on_its_way_to_stderr(said: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "json")
    current.jobs = a_job("j1")
    for number in range(1000):
        logging.getLogger("jobworker.x").warning("again", extra={"number": number})
    logging.getLogger().handlers[0].close()
    *lines, last = [json.loads(line) for line in said().splitlines()]
    assert [line["number"] for line in lines] == list(range(100))
    assert {
        "msg": "log.suppressed",
        "event": "again",
        "times": 900,
        "level": "warning",
    }.items() <= last.items()
    assert "job_id" not in last


def test_a_crash_and_a_warning_are_events_too() -> None:
    code = """if True:
        import sys, threading, warnings
        from jobworker.worker.telemetry import log
        from jobworker.worker.settings import Settings
        log.configure("reader", Settings(redis_url="redis://:hunter-2-hunter@h"), {})
        warnings.warn("old")
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start(), thread.join()
        raise RuntimeError("lost hunter-2-hunter")"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["level"] for event in events] == ["warning", "critical", "critical"]
    assert "ZeroDivisionError" in events[1]["exception"]
    assert "RuntimeError: lost ***" in events[2]["exception"]
    assert done.returncode == 1
