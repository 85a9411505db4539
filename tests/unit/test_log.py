"""Log lines: one JSON object an event, whatever is in it, and never a password."""

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator

import pytest

from jobworker.worker import log as logs
from jobworker.worker.log import ForPeople, JsonLines, redacted

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
        (f"redis://u:%40{SECRET}:/?#{SECRET}@host", "redis://u:***@host"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("http://127.0.0.1:9464/metrics", "http://127.0.0.1:9464/metrics"),
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
    logging.getLogger("pymilvus").warning("chatter")
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
