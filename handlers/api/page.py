"""Page Search of `jobworker web`: rows of a tenant and project that are nearest to a question."""

from functools import partial
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jobworker.worker.extension import Render, WebPage

from .client import SearchClient, SearchRefused, read_serve_token

#: Rows of a search.
_ROWS = 20


def search_page(api_url: str) -> WebPage:
    """The page; without the URL of an API it is not in the menu and answers 404."""
    client = SearchClient(api_url, read_serve_token("")) if api_url else None
    name = "Search" if client else ""
    return WebPage("/search", name, Path(__file__).with_name("templates"), partial(_answer, client))


def _answer(client: SearchClient | None, request: Request, render: Render) -> Response:
    if client is None:
        raise HTTPException(404, "No service with --serve-addr is known here: give --serve-url.")
    names = ("query", "tenant", "project", "collection", "chapter")
    asked = {name: request.query_params.get(name, "").strip() for name in names}
    found, error = None, ""
    if asked["query"]:
        body = {
            "query": asked["query"], "tenant_id": asked["tenant"], "project_id": asked["project"],
            "collection": asked["collection"] or "story_segments", "limit": _ROWS,
            "chapter_ids": [asked["chapter"]] if asked["chapter"] else [],
        }  # fmt: skip
        try:
            found = client.search(body)
        except SearchRefused as refused:
            error = str(refused)
    response: Response = render(
        request, "search.html", 502 if error else 200, asked=asked, found=found, error=error
    )
    return response
