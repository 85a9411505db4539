"""Access control of the page: token, sessions, login throttling and the origin of requests."""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..errors import ConfigurationError

#: One shift: an operator logs in once a night, and a page left open longer asks again.
SESSION_S = 12 * 3600.0
#: A shorter token could be guessed in spite of the login limit below.
MIN_TOKEN_CHARS = 16
#: Wrong tokens that one address may send in this time.
_MAX_FAILURES, _FAILURE_WINDOW_S = 10, 60.0
#: Limits on memory. More sessions or addresses are an attack; the oldest are dropped.
_MAX_SESSIONS, _MAX_ADDRESSES = 1000, 1000


class Session(NamedTuple):
    """A browser that sent the token. ``csrf`` is part of every form that it gets."""

    csrf: str
    mono_until_s: float


class TooManyFailures(Exception):
    """The address sent too many wrong tokens within a minute."""


class Access:
    """The token and the sessions opened with it. Without a token, everyone on this machine may read."""

    def __init__(self, token: str, *, mono_s: Callable[[], float] = time.monotonic) -> None:
        """Raises `ConfigurationError` if the token is short enough to be guessed."""
        if token and len(token) < MIN_TOKEN_CHARS:
            raise ConfigurationError(f"the token is too short: give {MIN_TOKEN_CHARS} characters or more")
        self._token = _digest(token) if token else None
        self._mono_s = mono_s
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    @property
    def requires_token(self) -> bool:
        """Whether a visitor must log in."""
        return self._token is not None

    def log_in(self, token: str, address: str) -> str | None:
        """The cookie of a new session; None for a wrong token. Raises `TooManyFailures`."""
        now_s = self._mono_s()
        failures = self._failures.setdefault(address, deque(maxlen=_MAX_FAILURES))
        self._failures.move_to_end(address)
        while len(self._failures) > _MAX_ADDRESSES:
            self._failures.popitem(last=False)
        if len(failures) == _MAX_FAILURES and now_s - failures[0] < _FAILURE_WINDOW_S:
            raise TooManyFailures
        if self._token is None or not hmac.compare_digest(_digest(token), self._token):
            failures.append(now_s)
            return None
        cookie = secrets.token_urlsafe(32)
        self._sessions[_digest(cookie)] = Session(secrets.token_urlsafe(32), now_s + SESSION_S)
        while len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return cookie

    def log_out(self, cookie: str) -> None:
        """End a session."""
        self._sessions.pop(_digest(cookie), None)

    def session(self, cookie: str | None) -> Session | None:
        """The session of a cookie; None if it is unknown or expired."""
        session = self._sessions.get(_digest(cookie)) if cookie else None
        return session if session and session.mono_until_s > self._mono_s() else None


def is_same_origin(headers: Mapping[str, str], host: str) -> bool:
    """Whether a request was sent by a page of this address (protection against cross-site requests).

    Browsers send Origin or Sec-Fetch-Site. A request with neither is refused.
    """
    origin = headers.get("origin")
    if origin is not None:
        return origin.partition("://")[2] == host != ""
    return headers.get("sec-fetch-site") == "same-origin"


def _digest(text: str) -> bytes:
    """A hash: equal in length for all texts, so that the time of a comparison reveals nothing."""
    return hashlib.sha256(text.encode()).digest()
