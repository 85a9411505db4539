"""ASGI application of the page: routes, middleware and error pages."""

from collections.abc import Callable, Iterable
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

from ..config.durations import InvalidDuration
from ..errors import StoreRefused, StoreUnavailable
from ..extension import WebPage
from ..telemetry.log import redacted
from .access import Access
from .actions import Actions
from .guard import Guard
from .pages import Pages, Site


def application(site: Site, access: Access, more: Iterable[WebPage], *, allow_actions: bool) -> Starlette:
    """Build the application, with ``more`` pages beside its own.

    Without a token all actions are refused, even with `allow_actions`.
    """
    pages, actions = Pages(site), Actions(site, access, allow_actions and access.requires_token)
    return Starlette(
        routes=[*_routes(pages, actions), *(_route(site, page) for page in more)],
        middleware=[Middleware(Guard, access=access)],
        exception_handlers=_error_pages(site),
    )


def _routes(pages: Pages, actions: Actions) -> list[BaseRoute]:
    return [
        Route("/", pages.overview),
        Route("/history.json", pages.history),
        Route("/queues", pages.queues),
        Route("/types", pages.types),
        Route("/workers", pages.workers),
        Route("/retries", pages.retries),
        Route("/dead", pages.dead),
        Route("/dead/letter", pages.letter),
        Route("/job", pages.job),
        Route("/dead/progress/{number}", pages.task),
        Route("/healthz", pages.health),
        Route("/login", actions.login_form),
        Route("/login", actions.log_in, methods=["POST"]),
        Route("/logout", actions.log_out, methods=["POST"]),
        Route("/dead/confirm", actions.confirm, methods=["POST"]),
        Route("/dead/do", actions.start_operation, methods=["POST"]),
        Route("/retries/now", actions.retry_now, methods=["POST"]),
        Route("/job/cancel", actions.cancel, methods=["POST"]),
        Route("/types/pause", actions.pause, methods=["POST"]),
        Route("/types/resume", actions.resume, methods=["POST"]),
        Mount("/static", StaticFiles(directory=Path(__file__).with_name("static"))),
    ]


def _route(site: Site, page: WebPage) -> Route:
    """The route of a page of the extension. Starlette calls it in a thread."""

    def answer(request: Request) -> Response:
        response: Response = page.answer(request, site.renderer.page)
        return response

    return Route(page.path, answer)


def _error_pages(site: Site) -> dict[Any, Callable[[Request, Exception], Response]]:
    """A handler for each exception that becomes an error page."""

    def error_page(request: Request, status: int, message: str) -> Response:
        title = HTTPStatus(status).phrase
        return site.renderer.page(request, "error.html", status, title=title, message=message)

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_page(request, error.status_code, error.detail)

    def unavailable(request: Request, error: Exception) -> Response:
        what = "refuses a key" if isinstance(error, StoreRefused) else "does not answer"
        return error_page(request, 503, f"The job store {what}: {redacted(str(error))}")

    def invalid_duration(request: Request, error: Exception) -> Response:
        assert isinstance(error, InvalidDuration)
        return error_page(request, 400, str(error))

    return {HTTPException: refused, StoreUnavailable: unavailable, InvalidDuration: invalid_duration}
