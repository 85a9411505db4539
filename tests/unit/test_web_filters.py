"""Filters and positions of dead letters in forms and links of the page."""

import pytest

from jobworker.worker.admin.dead_letters import Cursor
from jobworker.worker.config.durations import InvalidDuration
from jobworker.worker.web.filters import DeadFilter, format_cursor, parse_cursor


def test_a_link_holds_the_fields_that_were_read() -> None:
    fields = {"reason": "poison", "tenant": "t&1", "newer": " 2h "}
    filter = DeadFilter.read(lambda name: fields.get(name, ""))
    assert filter.query == "reason=poison&tenant=t%261&newer=2h&"
    assert filter.descriptions == ["reason poison", "tenant t&1", "dead for less than 2h"]
    conditions = filter.letter_filter(10_000.0)
    assert (conditions.after_wall_s, conditions.before_wall_s) == (2800.0, 10_000.0)


def test_letters_written_after_the_question_are_excluded() -> None:
    assert DeadFilter().letter_filter(10_000.0).before_wall_s == 10_000.0
    assert DeadFilter(older="1h").letter_filter(10_000.0).before_wall_s == 6400.0


def test_an_invalid_age_is_refused() -> None:
    with pytest.raises(InvalidDuration):
        DeadFilter(older="soon").letter_filter(1.0)


@pytest.mark.parametrize(
    "text", ["", "a", "a 1", "a 1-", "x 1-0", "a 1-0-0", "a ²-0", "a " + "1" * 50 + "-0"]
)
def test_an_invalid_cursor_is_refused(text: str) -> None:
    assert parse_cursor(text, ["a"]) is None


def test_a_stream_may_have_blanks_in_its_name() -> None:
    cursor = Cursor("my stream", b"17-3")
    assert parse_cursor(format_cursor(cursor), ["my stream"]) == cursor
