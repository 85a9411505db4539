"""Text of a failed try: what an author sees of an exception, and what bounds it."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from jobworker.worker.telemetry import log
from jobworker.worker.telemetry.failure import MAX_TRACEBACK_CHARS, failure_of, traceback_text


def raised(call: Callable[[], Any]) -> BaseException:
    """What the call raises, as the runner catches it."""
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("it raised nothing")


@pytest.fixture
def secret() -> Iterator[str]:
    log.set_secrets(["correct-horse"])
    yield "correct-horse"
    log.set_secrets([])


def parse(text: str) -> None:
    json.loads(text)


def wrap() -> None:
    try:
        parse("{")
    except ValueError as error:
        raise RuntimeError("no such chapter") from error


def test_it_shows_the_line_that_raised_and_the_cause() -> None:
    text = traceback_text(raised(wrap))
    assert 'raise RuntimeError("no such chapter") from error' in text
    assert "JSONDecodeError" in text
    assert text.endswith("RuntimeError: no such chapter")


def test_the_members_of_a_group_are_shown() -> None:
    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(parse, "{"))

    text = traceback_text(raised(lambda: asyncio.run(both())))
    assert "JSONDecodeError" in text
    assert "ExceptionGroup" in text


def test_endless_recursion_is_bounded_and_keeps_its_end() -> None:
    def down(depth: int) -> int:
        return up(depth) + 1

    def up(depth: int) -> int:
        return down(depth + 1)

    text = traceback_text(raised(lambda: down(0)))
    assert len(text) < MAX_TRACEBACK_CHARS + 100
    assert "RecursionError" in text.splitlines()[-1]


def test_a_chain_of_thousands_is_not_formatted_whole() -> None:
    formatted = 0

    class Counted(Exception):
        def __str__(self) -> str:
            nonlocal formatted
            formatted += 1
            return "again"

    def chain() -> None:
        error = Counted()
        for _ in range(5000):
            following = Counted()
            following.__context__ = error
            error = following
        raise error

    text = traceback_text(raised(chain))
    assert formatted < 20
    assert "raise error" in text
    assert text.endswith("Counted: again")


def test_secrets_are_redacted_also_where_the_text_is_cut(secret: str) -> None:
    def leak() -> None:
        raise ValueError("x" * (4096 - len("ValueError: ") - 6) + secret + "redis://u:" + secret + "@host/0")

    failure = failure_of(raised(leak), permanent=False)
    assert "correct" not in failure.error
    assert "correct" not in failure.traceback
    assert "u:***@host" in failure.traceback


@pytest.mark.parametrize("member", ["__str__", "__getattribute__"])
def test_an_exception_class_that_breaks_fails_its_job_only(member: str) -> None:
    def broken(self: object, *_: object) -> str:
        raise RuntimeError("broken")

    odd = type("Odd", (Exception,), {member: broken})

    def fail() -> None:
        raise odd("x")

    failure = failure_of(raised(fail), permanent=False)
    assert "Odd" in failure.error
    assert failure.traceback


def test_unpaired_surrogates_can_be_sent_and_stored() -> None:
    def fail() -> None:
        raise ValueError("\udcff")

    failure = failure_of(raised(fail), permanent=False)
    assert msgspec.json.decode(msgspec.json.encode(failure)) is not None
    assert "\\udcff" in failure.traceback


def test_an_exception_that_was_returned_has_no_traceback() -> None:
    assert failure_of(ValueError("no"), permanent=False).traceback == ""
