"""Puts the page together: addresses, what stands before them, and what is said when something fails."""

from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from ..admin.words import InvalidAge
from ..errors import StoreUnavailable
from ..telemetry.log import redacted
from .access import Access
from .actions import Actions
from .guard import Guard
from .pages import Pages, Site


def application(site: Site, access: Access, *, allow_actions: bool) -> Starlette:
    """The page as an ASGI application. Without a token nothing can be changed, whatever is allowed."""
    pages, actions = Pages(site), Actions(site, access, allow_actions and access.guarded)
    return Starlette(
        routes=_routes(pages, actions),
        middleware=[Middleware(Guard, access=access)],
        exception_handlers=_troubles(site),
    )


def _routes(pages: Pages, actions: Actions) -> list[BaseRoute]:
    return [
        Route("/", pages.overview),
        Route("/history.json", pages.history),
        Route("/queues", pages.queues),
        Route("/workers", pages.workers),
        Route("/retries", pages.retries),
        Route("/dead", pages.dead),
        Route("/dead/letter", pages.letter),
        Route("/job", pages.job),
        Route("/dead/progress/{number:int}", pages.work),
        Route("/healthz", pages.alive),
        Route("/login", actions.ask_token),
        Route("/login", actions.log_in, methods=["POST"]),
        Route("/logout", actions.log_out, methods=["POST"]),
        Route("/dead/confirm", actions.confirm, methods=["POST"]),
        Route("/dead/do", actions.do, methods=["POST"]),
        Route("/retries/now", actions.retry_now, methods=["POST"]),
        Route("/types/pause", actions.pause, methods=["POST"]),
        Route("/types/resume", actions.resume, methods=["POST"]),
        Mount("/static", StaticFiles(directory=Path(__file__).with_name("static"))),
    ]


def _troubles(site: Site) -> dict[Any, Callable[[Request, Exception], Response]]:
    """What a visitor is told instead of a page, by what went wrong."""

    def trouble(request: Request, status: int, says: str) -> Response:
        title = HTTPStatus(status).phrase
        return site.renderer.page(request, "error.html", status, title=title, says=says)

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return trouble(request, error.status_code, error.detail)

    def unavailable(request: Request, error: Exception) -> Response:
        return trouble(request, 503, f"The job store does not answer: {redacted(str(error))}")

    def no_age(request: Request, error: Exception) -> Response:
        assert isinstance(error, InvalidAge)
        return trouble(request, 400, str(error))

    return {HTTPException: refused, StoreUnavailable: unavailable, InvalidAge: no_age}
