"""Templates and what they are given: the one file that knows Jinja."""

import json
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse

from ..admin.words import format_duration, strip_control
from ..telemetry.log import redacted

#: Of a job or a stack that is shown whole: a browser stays quick, and more helps nobody.
_LONGEST_TEXT = 64 * 1024


def _finalize(value: Any) -> Any:
    """What tenants and handlers wrote must not turn the page's text round or hide in it."""
    return "" if value is None else strip_control(value) if type(value) is str else value


def text(value: Any) -> Markup:
    """Of several lines; anything but text as indented JSON. Long ones are cut, and say so."""
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, indent=2, default=str)
    cut = f"\n… {len(value) - _LONGEST_TEXT} characters more" if len(value) > _LONGEST_TEXT else ""
    lines = (value[:_LONGEST_TEXT] + cut).expandtabs(4).split("\n")
    return Markup("\n").join(escape(strip_control(line)) for line in lines)


def number(value: float) -> str:
    """Groups of three, with the narrow space that no line is broken at."""
    return f"{value:,.0f}".replace(",", "\u202f")


def rate(value: float) -> str:
    """A second; small ones with a digit more."""
    return number(value) if value >= 100 else f"{value:.1f}"


def ago(wall_s: float, wall_now_s: float) -> Markup:
    """How long it is since, with the very moment for whoever points at it."""
    moment = (
        datetime.fromtimestamp(wall_s, UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")
    )
    return Markup('<time title="{}">{}</time>').format(moment, format_duration(max(0.0, wall_now_s - wall_s)))


def clock(wall_s: float) -> str:
    """UTC, as the logs have it."""
    return datetime.fromtimestamp(wall_s, UTC).strftime("%H:%M:%S")


def _version() -> str:
    try:
        return version("jobworker")
    except PackageNotFoundError:
        return ""


class Renderer:
    """Makes pages of templates. ``shown`` is what every page is given."""

    def __init__(self, **shown: Any) -> None:
        folder = Path(__file__).with_name("templates")
        self._templates = Environment(
            loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, finalize=_finalize,
            trim_blocks=True, lstrip_blocks=True, auto_reload=False,
        )  # fmt: skip
        self._templates.filters |= {
            "span": format_duration, "text": text, "number": number, "rate": rate, "ago": ago, "clock": clock,
            "redacted": redacted,
        }  # fmt: skip
        self._templates.globals |= {"version": _version(), **shown}

    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """One page. `values` are the template's own."""
        session = getattr(request.state, "session", None)
        body = self._templates.get_template(template).render(
            path=request.url.path, session=session, csrf=session.csrf if session else "",
            wall_now_s=values.pop("wall_now_s", time.time()), **values,
        )  # fmt: skip
        return HTMLResponse(body, status)
