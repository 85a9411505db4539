"""Jinja templates, their filters and their globals. No other file imports Jinja."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse

from ..admin.words import format_duration, format_latency, strip_control
from ..safe_text import safe_json
from ..telemetry.log import redacted

#: Characters of a job or a stack trace that are shown. More would slow the browser down.
_MAX_TEXT_CHARS = 64 * 1024


def _finalize(value: Any) -> Any:
    """Strip control characters: text of tenants and handlers must not reverse or hide text of the page."""
    return "" if value is None else strip_control(value) if type(value) is str else value


def text(value: Any) -> Markup:
    """Text of several lines, or any other value as indented JSON. Long text is cut, with a note."""
    if not isinstance(value, str):
        value = safe_json(value, str, indent=True)
    cut = f"\n… {len(value) - _MAX_TEXT_CHARS} more characters" if len(value) > _MAX_TEXT_CHARS else ""
    lines = (value[:_MAX_TEXT_CHARS] + cut).expandtabs(4).split("\n")
    return Markup("\n").join(escape(strip_control(line)) for line in lines)


def number(value: float) -> str:
    """Digits in groups of three, separated by a narrow no-break space."""
    return f"{value:,.0f}".replace(",", "\u202f")


def rate(value: float) -> str:
    """A rate per second; one decimal if it is below 100."""
    return number(value) if value >= 100 else f"{value:.1f}"


def ago(wall_s: float, wall_now_s: float) -> Markup:
    """The age of a moment; the exact time is shown under the pointer."""
    moment = (
        datetime.fromtimestamp(wall_s, UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")
    )
    return Markup('<time title="{}">{}</time>').format(moment, format_duration(max(0.0, wall_now_s - wall_s)))


def _version() -> str:
    try:
        return version("jobworker")
    except PackageNotFoundError:
        return ""


class Renderer:
    """Renders templates. ``more_folders`` have templates of further pages; the keyword arguments are globals
    of every template."""

    def __init__(self, more_folders: Sequence[Path], **template_globals: Any) -> None:
        folders = [Path(__file__).with_name("templates"), *more_folders]
        self._templates = Environment(
            loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, finalize=_finalize,
            trim_blocks=True, lstrip_blocks=True, auto_reload=False,
        )  # fmt: skip
        self._templates.filters |= {
            "duration": format_duration, "latency": format_latency, "text": text, "number": number,
            "rate": rate, "ago": ago, "redacted": redacted,
        }  # fmt: skip
        self._templates.globals |= {"version": _version(), **template_globals}

    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Render a template; `values` are its variables."""
        session = getattr(request.state, "session", None)
        body = self._templates.get_template(template).render(
            path=request.url.path, session=session, csrf=session.csrf if session else "",
            wall_now_s=values.pop("wall_now_s", time.time()), **values,
        )  # fmt: skip
        return HTMLResponse(body, status)
