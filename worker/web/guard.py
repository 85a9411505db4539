"""Stands before every page: headers that keep a browser strict, foreign hosts and forms, and the session."""

from typing import Any
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .access import Access, is_loopback, is_ours

COOKIE = "jobworker_session"
#: What is shown to everybody: how to log in, and that the page is alive.
_OPEN = ("/login", "/healthz", "/static/")
#: Everything comes from here and nothing is written into the page itself, so an injected script runs nowhere.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: browsers would send our own forms with the origin `null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """Wraps the application; a request that it lets through has ``request.state.session``."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        session = self._access.session(request.cookies.get(COOKIE))
        scope.setdefault("state", {})["session"] = session
        refusal = self._refusal(request, session)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                _harden(MutableHeaders(scope=message), scope["path"])
            await send(message)

        await (refusal or self._app)(scope, receive, with_headers)

    def _refusal(self, request: Request, session: Any) -> Response | None:
        host = request.headers.get("host", "")
        if not self._access.guarded and not is_loopback(host):
            text = (
                f"This page has no token, so it answers to names of its own machine only, not to {host!r}.\n"
            )
            return PlainTextResponse(text, 421)
        if request.method not in ("GET", "HEAD") and not is_ours(request.headers, host):
            return PlainTextResponse("This was not sent by a page of this address.\n", 403)
        if self._access.guarded and session is None and not request.url.path.startswith(_OPEN):
            return _ask_for_token(request)
        return None


def _ask_for_token(request: Request) -> Response:
    if request.method != "GET" or "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("log in first\n", 401)
    wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"/login?next={quote(wanted, safe='')}", 303)


def _harden(headers: MutableHeaders, path: str) -> None:
    for name, value in _HEADERS.items():
        headers[name] = value
    # A page is of this moment and may be a tenant's business; files are asked about again, by their tag.
    headers["Cache-Control"] = "no-cache" if path.startswith("/static/") else "no-store"
