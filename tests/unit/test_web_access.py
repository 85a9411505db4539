"""Who may look at the page and act on it; what is asked for in forms and links."""

import pytest

from jobworker.worker.admin.dead_letters import Cursor
from jobworker.worker.admin.overview import Overview
from jobworker.worker.admin.words import InvalidAge
from jobworker.worker.errors import ConfigurationError
from jobworker.worker.web.access import SESSION_S, Access, TooManyTries, is_loopback, is_ours
from jobworker.worker.web.filters import DeadFilter, read_place, write_place
from jobworker.worker.web.history import History

TOKEN = "0123456789abcdef"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TestSessions:
    def test_only_the_token_opens_one_and_time_or_hand_ends_it(self) -> None:
        clock = Clock()
        access = Access(TOKEN, mono_s=clock)
        assert access.log_in("wrong", "a") is None
        cookie, other = access.log_in(TOKEN, "a"), access.log_in(TOKEN, "a")
        assert cookie is not None
        assert other is not None
        session = access.session(cookie)
        assert session is not None
        assert session.csrf != access.session(other).csrf  # type: ignore[union-attr]
        assert access.session(cookie + "x") is None
        assert access.session(None) is None
        access.log_out(cookie)
        assert access.session(cookie) is None
        clock.now_s += SESSION_S
        assert access.session(other) is None

    def test_ten_wrong_tokens_a_minute_and_no_more_for_each_address(self) -> None:
        clock = Clock()
        access = Access(TOKEN, mono_s=clock)
        for _ in range(10):
            assert access.log_in("wrong", "a") is None
        with pytest.raises(TooManyTries):
            access.log_in(TOKEN, "a")
        assert access.log_in(TOKEN, "b") is not None
        clock.now_s += 61
        assert access.log_in(TOKEN, "a") is not None

    def test_a_token_that_can_be_guessed_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="too short"):
            Access(TOKEN[:-1])
        unguarded = Access("")
        assert not unguarded.guarded
        assert unguarded.log_in("", "a") is None, "nobody can act where there is no token"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9465", "127.0.0.1", "127.8.8.8:1", "[::1]:9465", "::1"]
)
def test_names_of_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "127.0.0.1.evil.example", "0.0.0.0", "[::]:9465", "10.0.0.1:9465", "localhost.x"],
)
def test_names_of_others(host: str) -> None:
    assert not is_loopback(host)


def test_where_a_form_comes_from() -> None:
    assert is_ours({"origin": "http://127.0.0.1:9465"}, "127.0.0.1:9465")
    assert is_ours({"origin": "https://page.example"}, "page.example")
    assert is_ours({"sec-fetch-site": "same-origin"}, "x")
    for headers in (
        {},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:80"},
        {"sec-fetch-site": "same-site"},
    ):
        assert not is_ours(headers, "127.0.0.1:9465")
    assert not is_ours({"origin": ""}, "")
    assert not is_ours({"origin": "http://evil.example", "sec-fetch-site": "same-origin"}, "x")


class TestFilters:
    def test_a_link_says_what_was_read(self) -> None:
        said = {"reason": "poison", "tenant": "t&1", "newer": " 2h "}
        filter = DeadFilter.read(lambda name: said.get(name, ""))
        assert filter.query == "reason=poison&tenant=t%261&newer=2h&"
        assert filter.words == ["reason poison", "tenant t&1", "given up within the last 2h"]
        choice = filter.choice(10_000.0)
        assert (choice.after_wall_s, choice.before_wall_s) == (2800.0, 10_000.0)

    def test_an_age_that_is_none_is_told(self) -> None:
        with pytest.raises(InvalidAge):
            DeadFilter(older="soon").choice(1.0)

    @pytest.mark.parametrize(
        "text", ["", "a", "a 1", "a 1-", "x 1-0", "a 1-0-0", "a ²-0", "a " + "1" * 50 + "-0"]
    )
    def test_what_is_no_place(self, text: str) -> None:
        assert read_place(text, ["a"]) is None

    def test_a_stream_may_have_blanks_in_its_name(self) -> None:
        place = Cursor("my stream", b"17-3")
        assert read_place(write_place(place), ["my stream"]) == place


def test_the_board_tells_what_is_new() -> None:
    looks = iter(range(1, 1000))
    board = History(lambda: Overview(float(next(looks))), 60.0)
    for _ in range(3):
        board._remember(board._look())
    assert board.history(0)["wall_s"] == [1.0, 2.0, 3.0]
    fresh = board.history(2)
    assert (fresh["last"], fresh["whole"], fresh["wall_s"]) == (3, False, [3.0])
    assert board.history(3)["wall_s"] == []
    assert board.history(99)["wall_s"] == [1.0, 2.0, 3.0], "numbers of the run before"
    assert board.seen.wall_s == 3.0
