"""Log lines: one JSON object per event, whatever it contains, and never a password."""

import io
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobworker.handlers.settings import HandlerSettings
from jobworker.worker import Job
from jobworker.worker.safe_text import CONTROL
from jobworker.worker.telemetry import log as logs
from jobworker.worker.telemetry.current_job import current
from jobworker.worker.telemetry.log import JsonFormatter, TextFormatter, redacted, secrets_of, set_secrets

SECRET = "s3cr3t"
#: Libraries whose level is set as well.
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


@contextmanager
def restored_hooks() -> Iterator[None]:
    """Undo what `configure` sets beside the loggers."""
    hooks = sys.excepthook, threading.excepthook
    yield
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Returns what was written to stderr since the last call; restores the loggers afterwards."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in (None, *NOISY)}
    yield lambda: capsys.readouterr().err
    root.handlers[:] = handlers
    set_secrets(())
    current.jobs = ()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_an_event_is_one_json_line_with_its_fields(stderr: Callable[[], str]) -> None:
    logs.set_up("worker 3", "info", "json")
    logging.getLogger("jobworker.x").warning("第 %d 章", 7, extra={"job_id": "a\nb", "deaths": 2})
    (line,) = stderr().splitlines()
    event = json.loads(line)
    assert event.pop("timestamp").endswith("+00:00")
    assert event == {
        "level": "warning", "msg": "第 7 章", "service": "jobworker", "role": "worker 3",
        "job_id": "a\nb", "deaths": 2,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_part_of_a_line_contains_a_password(stderr: Callable[[], str], form: str) -> None:
    """In the message, an argument, a field, a nested field, an exception and its traceback."""
    logs.set_up("reader", "info", form)
    log = logging.getLogger("jobworker.x")
    url = f"redis://user:{SECRET}@host:6379/0"
    try:
        raise ConnectionError(f"cannot reach {url}")
    except ConnectionError:
        log.exception("lost %s", url, extra={"url": url, "settings": {"redis_url": url, "more": [url]}})
    line = stderr()
    assert SECRET not in line
    assert line.count("***@host") >= 5


def test_a_forked_child_keeps_the_handler_that_has_written_nothing() -> None:
    code = """
import logging, os
from jobworker.worker.telemetry import log

def forked(role, limit=100):
    before = logging.getLogger().handlers[0]
    if os.fork() == 0:
        log.set_up(role, "info", "text", limit)
        (handler,) = logging.getLogger().handlers
        logging.getLogger("jobworker.x").info("kept" if handler is before else "new")
        os._exit(0)
    assert os.wait()[1] == 0

log.set_up("forkserver", "warning", "json", 100)
forked("one")
forked("two", limit=7)
logging.getLogger("jobworker.x").warning("used")
forked("three")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    first, second, used, third = done.stderr.splitlines()
    assert first.endswith(" one: kept")
    assert second.endswith(" two: new"), "another limit"
    assert json.loads(used)["role"] == "forkserver"
    assert third.endswith(" three: new"), "its counts and its thread belong to the parent"


def test_a_traceback_is_in_the_same_json_line(stderr: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "json")
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("jobworker.x").exception("failed")
    (line,) = stderr().splitlines()
    assert "ValueError: no" in json.loads(line)["exception"]


def test_a_value_that_json_does_not_know_is_written_as_text(stderr: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "json")
    logging.getLogger("jobworker.x").info("read", extra={"id": b"1-1", "kinds": {1}})
    assert json.loads(stderr())["id"] == "b'1-1'"


def test_a_text_line(stderr: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "text")
    logging.getLogger("jobworker.x").warning("lease.lost", extra={"entries": 3})
    assert stderr().rstrip().endswith("warning reader: lease.lost entries=3")


def test_a_text_line_has_the_date_unless_a_terminal_shows_it(stderr: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "text")
    logging.getLogger("jobworker.x").warning("lease.lost")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d warning reader", stderr())
    record = logging.makeLogRecord({"msg": "lease.lost", "levelname": "WARNING"})
    assert re.match(r"\d\d:\d\d:\d\d warning reader", TextFormatter("reader").format(record))


@pytest.mark.parametrize(("limit", "written"), [(3, 3), (0, 150)])
def test_the_limit_of_lines_is_an_option(stderr: Callable[[], str], limit: int, written: int) -> None:
    settings = HandlerSettings(log_format="text", log_limit=limit)
    with restored_hooks():
        logs.configure("worker 0", settings, {})
    for number in range(150):
        logging.getLogger("mine").info("page %d", number)
    assert stderr().count("page") == written


HOSTILE = "x\n12:00:01 info reader: forged\r\x1b[2J\x9b2J\u202eabc\u2066\u200f\u061c\u2028\x7f\ud800"


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_field_cannot_start_a_line_or_control_a_terminal(stderr: Callable[[], str], form: str) -> None:
    logs.set_up("reader", "info", form)
    logging.getLogger("jobworker.x").warning("lost %s", HOSTILE, extra={"job_id": HOSTILE, HOSTILE: 1})
    (line,) = stderr().splitlines()
    assert not CONTROL.search(line)
    assert "\\u202e" in line
    if form == "json":
        assert json.loads(line)["job_id"] == HOSTILE


def test_an_exception_cannot_start_a_text_line(stderr: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "text")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("jobworker.x").exception("failed")
    first, *others = stderr().removesuffix("\n").split("\n")
    assert first.endswith("error   reader: failed")
    assert [line for line in others if "forged" in line]
    assert all(line.startswith("    ") and not CONTROL.search(line) for line in others)


def test_the_level_applies_to_all_loggers_and_libraries_are_quiet(stderr: Callable[[], str]) -> None:
    logs.set_up("reader", "warning", "json")
    logging.getLogger("jobworker.x").info("not worth it")
    logging.getLogger("urllib3").warning("chatter")
    assert stderr() == ""


def test_a_full_disk_under_the_log_raises_no_error(
    monkeypatch: pytest.MonkeyPatch, stderr: Callable[[], str]
) -> None:
    """It must not stop the settlement of jobs."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    logs.set_up("reader", "info", "json")
    logging.getLogger("jobworker.x").error("lost")


@pytest.mark.parametrize("formatter", [JsonFormatter("r"), TextFormatter("r")])
def test_formatting_does_not_change_the_record(formatter: logging.Formatter) -> None:
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
def test_the_secrets_of_the_service_are_redacted_everywhere(
    stderr: Callable[[], str], form: str, secret: str
) -> None:
    environment = {"JOBWORKER_LLM_KEY": KEY, "OTEL_EXPORTER_OTLP_HEADERS": "a=1,api-key=h3ader-value"}
    set_secrets(secrets_of(SERVICE, environment))
    logs.set_up("reader", "info", form)
    try:
        raise ConnectionError(f"refused {secret}!")
    except ConnectionError:
        extra = {"tried": secret, "more": {"deep": [f"a{secret}b"]}, "other": SimpleNamespace(key=secret)}
        logging.getLogger("jobworker.x").exception("at %s", secret, extra=extra)
    line = stderr()
    text = json.dumps(json.loads(line), ensure_ascii=False) if form == "json" else line
    for way in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]):
        assert way not in text
    assert "ConnectionError: refused ***!" in text


@pytest.mark.parametrize("ascii", [True, False])
def test_a_secret_inside_of_json_is_redacted_with_letters_escaped_or_not(ascii: bool) -> None:
    secret = 'p"ä-wörter'
    set_secrets({secret})
    assert redacted(json.dumps(["got", secret], ensure_ascii=ascii)) == '["got", "***"]'


def test_a_line_holds_what_the_json_library_refuses(stderr: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "json")
    extra = {"large": 2**64, "none": float("nan"), "half": "\ud800", "by": {7: float("inf")}}
    logging.getLogger("jobworker.x").info("odd", extra=extra)
    event = json.loads(stderr(), parse_constant=pytest.fail)
    assert {name: event[name] for name in extra} == extra | {"none": None, "by": {"7": None}}


def test_a_key_in_a_file_is_a_secret_and_a_missing_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-from-a-file\n")
    assert "sk-from-a-file" in secrets_of(HandlerSettings(llm_key_file=str(tmp_path / "key")), {})
    assert secrets_of(
        HandlerSettings(llm_key_file=str(tmp_path / "none")), {"PATH": "/bin", "A_KEY": "x"}
    ) == {""}


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_line_about_a_huge_job_is_bounded_and_contains_no_part_of_a_password(
    stderr: Callable[[], str], form: str
) -> None:
    """Redaction comes before the cut: half a password would not be recognised."""
    logs.set_up("worker 0", "info", form)
    huge = "x" * (logs.MAX_TEXT_CHARS // 2 - 20) + f" redis://u:{SECRET * 20}@host " + "y" * 1_000_000
    current.jobs = a_job(huge, metadata={"request_id": huge})
    try:
        raise ValueError(huge)
    except ValueError:
        extra = {"many": [huge] * 1000, "tree": {huge: huge}, "error": huge}
        logging.getLogger("theirs").exception("stored %s", huge, extra=extra)
    line = stderr()
    assert SECRET not in line
    assert len(line) < 100 * logs.MAX_TEXT_CHARS
    assert "ValueError" in line
    assert "936 items" in line


def test_a_short_password_is_not_redacted_inside_of_words(stderr: Callable[[], str]) -> None:
    set_secrets(secrets_of(HandlerSettings(redis_url="redis://:read@h:1"), {}))
    logs.set_up("reader", "info", "json")
    logging.getLogger("jobworker.x").info("reading redis://:read@h:1")
    assert json.loads(stderr())["msg"] == "reading redis://:***@h:1"


def a_job(id: str, **more: Any) -> Job:
    fields = {"type": "noop", "tenant_id": "t1", "project_id": "p1", "payload": None, "metadata": {},
              "created_at": "", "stream": "s", "entry_id": "1-1", "retry_count": 0}  # fmt: skip
    return Job(id=id, **(fields | more))


def test_a_line_of_a_handler_carries_the_running_job(stderr: Callable[[], str]) -> None:
    logs.set_up("worker 0", "info", "json")
    current.jobs = a_job("j1", metadata={"request_id": "r1", "priority": "5"})
    logging.getLogger("theirs").info("stored")
    event = json.loads(stderr())
    expected = {
        "job_id": "j1",
        "task_type": "noop",
        "tenant_id": "t1",
        "project_id": "p1",
        "request_id": "r1",
    }
    assert expected.items() <= event.items()
    assert "priority" not in event


def test_a_line_of_a_batch_carries_the_fields_that_its_jobs_share(stderr: Callable[[], str]) -> None:
    logs.set_up("worker 0", "info", "json")
    current.jobs = [a_job("j1", project_id="p1"), a_job("j2", project_id="p2")]
    logging.getLogger("theirs").info("stored")
    event = json.loads(stderr())
    assert (event["jobs"], event["task_type"], event["tenant_id"]) == (2, "noop", "t1")
    assert not {"job_id", "project_id"} & event.keys()


def test_a_flood_of_one_event_is_cut_and_its_size_is_reported(stderr: Callable[[], str]) -> None:
    logs.set_up("reader", "info", "json")
    current.jobs = a_job("j1")
    for number in range(1000):
        logging.getLogger("jobworker.x").warning("again", extra={"number": number})
    logging.getLogger().handlers[0].close()
    *lines, last = [json.loads(line) for line in stderr().splitlines()]
    assert [line["number"] for line in lines] == list(range(100))
    assert {
        "msg": "log.suppressed",
        "event": "again",
        "times": 900,
        "level": "warning",
    }.items() <= last.items()
    assert "job_id" not in last


def test_a_crash_and_a_warning_are_events() -> None:
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


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


def _contains_itself(items: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    found |= {str(number): found for number in range(items)}
    return found


def _nested(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(
    ("message", "args", "parts"),
    [
        ("a %s %d", ("x",), ["a %s %d", "'x'", "not enough arguments"]),
        ("100%", ("x",), ["100%", "'x'"]),
        ("a %s %s", (Unprintable(), "y"), ["a %s %s", "<Unprintable: ", "'y'"]),
        ("big %d", (10**5000,), ["big %d", "<int of 16610 bits>"]),
        ("%(name)s", ({"other": 1},), ["%(name)s", "other"]),
        (Unprintable(), (), ["<Unprintable: "]),
    ],
    ids=("missing", "percent", "unprintable", "big", "mapping", "message"),
)
def test_a_message_that_cannot_be_formatted_is_written_with_its_arguments(
    stderr: Callable[[], str], form: str, message: Any, args: tuple[Any, ...], parts: list[str]
) -> None:
    logs.set_up("reader", "info", form)
    logging.getLogger("mine").warning(message, *args)
    (line,) = stderr().splitlines()
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(
    "value",
    [Unprintable(), {"a": Unprintable()}, 10**5000, _contains_itself(1), _contains_itself(60), _nested(3000),
     float("nan"), [float("inf"), 2**70], {Unprintable: 1}],
    ids=map(str, range(9)),
)  # fmt: skip
def test_a_field_of_any_kind_is_written(stderr: Callable[[], str], form: str, value: Any) -> None:
    logs.set_up("reader", "info", form)
    logging.getLogger("mine").warning("read", extra={"v": value, "task_type": value})
    (line,) = stderr().splitlines()
    assert len(line) < 2_000_000
    if form == "json":
        event = json.loads(line, parse_constant=pytest.fail)
        assert event["msg"] == "read"
        assert "v" in event


def test_an_exception_of_any_kind_is_written(stderr: Callable[[], str]) -> None:
    class Odd(Exception):
        __str__ = Unprintable.__str__

        @property
        def __cause__(self) -> BaseException:  # type: ignore[override]
            raise RuntimeError("no cause")

    logs.set_up("reader", "info", "json")
    logging.getLogger("mine").warning("read", exc_info=Odd())
    event = json.loads(stderr())
    assert event["msg"] == "read"
    assert "Odd" in event["exception"]


def test_a_field_cannot_replace_those_of_the_line_and_of_the_job(stderr: Callable[[], str]) -> None:
    logs.set_up("worker 3", "info", "json")
    names = ("timestamp", "level", "service", "role", "job_id", "other")
    with_job = Job("j", "audit", "", "", None, {}, "", "s", "1-1", 0)
    current.jobs = with_job
    logging.getLogger("mine").warning("read", extra={**dict.fromkeys(names, "forged"), "task_type": "audit"})
    event = json.loads(stderr())
    assert event | {"level": "warning", "service": "jobworker", "role": "worker 3", "job_id": "j"} == event
    assert event["timestamp"] != "forged"
    assert [event[f"{name}_"] for name in names[:-1]] == ["forged"] * 5
    assert (event["other"], event["task_type"]) == ("forged", "audit")
    assert "task_type_" not in event
