"""ASGI middleware before every page: session check, host and origin checks, security headers."""

from typing import Any
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..urls import is_loopback
from .access import Access, is_same_origin

COOKIE = "jobworker_session"
#: Paths that need no session: the login form with its files, and the health check.
_PUBLIC_PATHS = ("/login", "/healthz", "/static/")
#: Scripts and styles are files of this server and never inline, so a browser refuses an injected script.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: browsers would then send our own forms with the origin `null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """Refuses requests or passes them on. A request that is passed on has ``request.state.session``, which
    is None if no token is required."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        session = self._access.session(request.cookies.get(COOKIE))
        scope.setdefault("state", {})["session"] = session
        refusal = self._refusal(request, session)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                _set_security_headers(MutableHeaders(scope=message), scope["path"])
            await send(message)

        await (refusal or self._app)(scope, receive, with_headers)

    def _refusal(self, request: Request, session: Any) -> Response | None:
        host = request.headers.get("host", "")
        if not self._access.requires_token and not is_loopback(host):
            text = f"Without a token this page answers to loopback names only, not to {host!r}.\n"
            return PlainTextResponse(text, 421)
        if request.method not in ("GET", "HEAD") and not is_same_origin(request.headers, host):
            return PlainTextResponse("Refused: the form was sent from another site.\n", 403)
        if self._access.requires_token and session is None and not request.url.path.startswith(_PUBLIC_PATHS):
            return _require_login(request)
        return None


def _require_login(request: Request) -> Response:
    if request.method != "GET" or "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("Log in first.\n", 401)
    next_page = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"/login?next={quote(next_page, safe='')}", 303)


def _set_security_headers(headers: MutableHeaders, path: str) -> None:
    for name, value in _HEADERS.items():
        headers[name] = value
    # A page is outdated at once and may hold a tenant's data. Files are revalidated by their ETag.
    headers["Cache-Control"] = "no-cache" if path.startswith("/static/") else "no-store"
