"""Access to the page: token, sessions, login throttling and the origin of requests."""

import pytest

from jobworker.worker.errors import ConfigurationError
from jobworker.worker.urls import is_loopback
from jobworker.worker.web.access import SESSION_S, Access, TooManyFailures, is_same_origin

TOKEN = "0123456789abcdef"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TestSessions:
    def test_only_the_token_opens_one_and_it_ends_by_time_or_log_out(self) -> None:
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

    def test_each_address_may_send_ten_wrong_tokens_a_minute(self) -> None:
        clock = Clock()
        access = Access(TOKEN, mono_s=clock)
        for _ in range(10):
            assert access.log_in("wrong", "a") is None
        with pytest.raises(TooManyFailures):
            access.log_in(TOKEN, "a")
        assert access.log_in(TOKEN, "b") is not None
        clock.now_s += 61
        assert access.log_in(TOKEN, "a") is not None

    def test_a_token_that_can_be_guessed_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="too short"):
            Access(TOKEN[:-1])
        open_access = Access("")
        assert not open_access.requires_token
        assert open_access.log_in("", "a") is None, "without a token there is no session and no action"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9465", "127.0.0.1", "127.8.8.8:1", "[::1]:9465", "::1"]
)
def test_loopback_names_are_recognised(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "127.0.0.1.evil.example",
        "0.0.0.0",
        "[::]:9465",
        "10.0.0.1:9465",
        "localhost.x",
        "[::1].evil.example",
        "[::1]x",
        "[::1",
        "::1]",
        "[]",
        "localhost:80.evil.example",
        "127.0.0.1:",
    ],
)
def test_other_names_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_only_a_form_of_the_same_origin_is_accepted() -> None:
    assert is_same_origin({"origin": "http://127.0.0.1:9465"}, "127.0.0.1:9465")
    assert is_same_origin({"origin": "https://page.example"}, "page.example")
    assert is_same_origin({"sec-fetch-site": "same-origin"}, "x")
    for headers in (
        {},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:80"},
        {"sec-fetch-site": "same-site"},
    ):
        assert not is_same_origin(headers, "127.0.0.1:9465")
    assert not is_same_origin({"origin": ""}, "")
    assert not is_same_origin({"origin": "http://evil.example", "sec-fetch-site": "same-origin"}, "x")
