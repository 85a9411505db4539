"""Who may see the page and who may act on it: the token, sessions, and where a request comes from."""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import NamedTuple

from ..errors import ConfigurationError

#: A shift, so that nobody logs in twice a night; a page left open for longer asks again.
SESSION_S = 12 * 3600.0
#: Shorter ones could be guessed within reach of the limit below.
LEAST_TOKEN_CHARS = 16
#: Wrong tokens that one address may send a minute.
_TRIES, _TRIES_WITHIN_S = 10, 60.0
#: Sessions and addresses that are remembered: more are an attack, and the oldest make way.
_MOST_SESSIONS, _MOST_ADDRESSES = 1000, 1000


class Session(NamedTuple):
    """Somebody who has given the token; ``csrf`` stands in every form that they are given."""

    csrf: str
    mono_until_s: float


class TooManyTries(Exception):
    """This address has sent too many wrong tokens of late."""


class Access:
    """The token and the sessions that were opened with it; without a token everybody may look."""

    def __init__(self, token: str, *, mono_s: Callable[[], float] = time.monotonic) -> None:
        """Raises `ConfigurationError` where the token can be guessed."""
        if token and len(token) < LEAST_TOKEN_CHARS:
            raise ConfigurationError(f"the token is too short: give {LEAST_TOKEN_CHARS} characters or more")
        self._token = _digest(token) if token else None
        self._mono_s = mono_s
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    @property
    def guarded(self) -> bool:
        """Whether a token is asked for."""
        return self._token is not None

    def log_in(self, token: str, address: str) -> str | None:
        """The cookie of a new session, or None for a wrong token. Raises `TooManyTries`."""
        now_s = self._mono_s()
        failures = self._failures.setdefault(address, deque(maxlen=_TRIES))
        self._failures.move_to_end(address)
        while len(self._failures) > _MOST_ADDRESSES:
            self._failures.popitem(last=False)
        if len(failures) == _TRIES and now_s - failures[0] < _TRIES_WITHIN_S:
            raise TooManyTries
        if self._token is None or not hmac.compare_digest(_digest(token), self._token):
            failures.append(now_s)
            return None
        cookie = secrets.token_urlsafe(32)
        self._sessions[_digest(cookie)] = Session(secrets.token_urlsafe(32), now_s + SESSION_S)
        while len(self._sessions) > _MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return cookie

    def log_out(self, cookie: str) -> None:
        """End a session."""
        self._sessions.pop(_digest(cookie), None)

    def session(self, cookie: str | None) -> Session | None:
        """The session of a cookie, while it lasts."""
        session = self._sessions.get(_digest(cookie)) if cookie else None
        return session if session and session.mono_until_s > self._mono_s() else None


def is_ours(headers: Mapping[str, str], host: str) -> bool:
    """Whether a request that changes something was sent by a page of this very address.

    A browser says so by Origin; where that is missing, by Sec-Fetch-Site. One that says neither is refused.
    """
    origin = headers.get("origin")
    if origin is not None:
        return origin.partition("://")[2] == host != ""
    return headers.get("sec-fetch-site") == "same-origin"


def is_loopback(host: str) -> bool:
    """Whether a Host header or an address names this machine to itself. Any other name on an unguarded
    page is a foreign site's that was made to point here."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host
    if name.count(":") == 1:
        name = name.partition(":")[0]
    try:
        return name.lower() == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _digest(text: str) -> bytes:
    """Of equal length whatever the text, so that a comparison tells nothing."""
    return hashlib.sha256(text.encode()).digest()
