"""``jobworker top``: a live page in a terminal, by keys; one look in plain text where there is none."""

import contextlib
import curses
import locale
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from ..admin.deployment import Deployment
from ..admin.overview import Overview, overview_poller_of
from ..admin.words import format_duration
from ..errors import StoreUnavailable
from ..telemetry.log import redacted
from .common import AS_JSON, STREAMS, say_json, verb_on_deployment
from .screen import ScreenLine, lines

#: How late a key press is heeded at most.
_KEYS_EVERY_MS = 100
#: The first rates need two looks; in plain text they are taken this far apart.
_FIRST_WINDOW_S = 1.0
_KEYS = "q quit   p freeze   ↑ ↓ PgUp PgDn scroll   space look now"


def add_to(main: click.Group) -> None:
    """Make it a verb of ``jobworker``."""
    command = AS_JSON(top)
    for option in (
        STREAMS,
        click.option("--once", is_flag=True, help="One look in plain text, also on a terminal."),
        click.option("--interval", type=click.FloatRange(0.2), default=1.0, show_default=True,
                     help="Seconds between two looks."),
    ):  # fmt: skip
        command = option(command)
    verb_on_deployment(main)(command)


def top(deployment: Deployment, interval: float, once: bool, streams: tuple[str, ...], as_json: bool) -> None:
    """Watch the deployment live.

    Shown are streams, rates, what every worker runs, and the last failures. Keys: q quits, p freezes the
    page, arrows and Page keys scroll, space looks at once. Without a terminal (or with --once or --json) one
    look is printed. Workers and rates are what the services say at --metrics-url; give it once for each host.

    \b
    jobworker top
    jobworker top --metrics-url http://a:9464 --metrics-url http://b:9464
    """
    watcher = overview_poller_of(deployment, streams)
    if as_json or once or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        watcher.look()
        time.sleep(_FIRST_WINDOW_S)  # rates are what happens in between
        seen = watcher.look()
        _print(seen, as_json)
        if seen.trouble:
            raise StoreUnavailable(seen.trouble)
        return
    with contextlib.suppress(locale.Error):  # ssh sends a name that this host may not have
        locale.setlocale(locale.LC_ALL, "")
    _know_the_terminal()
    os.environ.setdefault("ESCDELAY", "25")
    curses.wrapper(_Page(watcher.look, interval).run)


def as_plain(seen: Overview) -> dict[str, Any]:
    """A look for machines."""
    return {
        "streams": [{**source._asdict(), **depths._asdict()} for source, depths in seen.streams],
        "services": [
            {"url": one.url, "trouble": redacted(one.trouble)}
            | {key: value for key, value in one.said.items() if key != "metrics"}
            for one in seen.services
        ],
        "totals": seen.totals,
        "rates": seen.rates,
        "paused": [pause._asdict() for pause in seen.pauses],
        "failures": [
            {key: value for key, value in asdict(letter).items() if key not in ("task", "raw", "details")}
            for letter in seen.letters
        ],
        "trouble": redacted(seen.trouble),
    }


def _print(seen: Overview, as_json: bool) -> None:
    if as_json:
        say_json(as_plain(seen))
        return
    width = int(os.environ.get("COLUMNS", 0)) or 200
    for line in lines(seen, width):
        click.echo(line.text)


def _know_the_terminal() -> None:
    """A terminal newer than this host's descriptions, as comes by ssh, most likely does what xterm does."""
    try:
        curses.setupterm()
    except curses.error:
        os.environ["TERM"] = "xterm"


class _Page:
    """The live page. A thread of its own looks, so that keys are heeded while a store is silent."""

    def __init__(self, look: Callable[[], Overview], interval_s: float) -> None:
        self._look = look
        self._interval_s = interval_s
        self._seen: Overview | None = None
        self._error: Exception | None = None
        self._mono_seen_s = 0.0
        self._now = threading.Event()
        self._frozen = False
        self._offset = 0

    def run(self, screen: "curses.window") -> None:
        """Until q is pressed."""
        with contextlib.suppress(curses.error):  # a terminal whose cursor cannot be hidden
            curses.curs_set(0)
        if curses.has_colors():
            curses.use_default_colors()
            for number, colour in enumerate((curses.COLOR_RED, curses.COLOR_CYAN), 1):
                curses.init_pair(number, colour, -1)
        screen.timeout(_KEYS_EVERY_MS)
        threading.Thread(target=self._keep_looking, name="look", daemon=True).start()
        while True:
            self._draw(screen)
            if self._error is not None:
                raise self._error
            if not self._heed(screen.getch(), screen.getmaxyx()[0]):
                return

    def _keep_looking(self) -> None:
        while self._error is None:
            try:
                seen = self._look()
            except Exception as error:  # the page's own thread raises it, where the terminal is put back
                self._error = error
                return
            if not self._frozen:
                self._seen, self._mono_seen_s = seen, time.monotonic()
            self._now.wait(self._interval_s)
            self._now.clear()

    def _heed(self, key: int, height: int) -> bool:
        """Do what a key says; False: quit."""
        steps = {curses.KEY_UP: -1, curses.KEY_DOWN: 1, ord("k"): -1, ord("j"): 1,
                 curses.KEY_PPAGE: 2 - height, curses.KEY_NPAGE: height - 2}  # fmt: skip
        self._offset = max(0, self._offset + steps.get(key, 0))
        if key == ord("p"):
            self._frozen = not self._frozen
        if key == ord(" "):
            self._now.set()
        return key not in (ord("q"), ord("Q"))

    def _draw(self, screen: "curses.window") -> None:
        height, width = screen.getmaxyx()
        page = lines(self._seen, width - 1) if self._seen else [ScreenLine("looking …")]
        room = max(0, height - 2)
        self._offset = min(self._offset, max(0, len(page) - 1 - room))
        screen.erase()
        shown = [page[0], *page[1 + self._offset : 1 + self._offset + room]]
        for row, line in enumerate(shown[: height - 1]):
            screen.addstr(row, 0, line.text, _attribute(line.style))
        screen.addstr(height - 1, 0, self._footer(len(page) - 1, room)[: width - 1], curses.A_REVERSE)
        screen.refresh()

    def _footer(self, length: int, room: int) -> str:
        age_s = time.monotonic() - self._mono_seen_s if self._seen else 0.0
        state = (
            "FROZEN"
            if self._frozen
            else f"{format_duration(age_s)} old"
            if age_s > 2 * self._interval_s + 1
            else ""
        )
        where = f"{self._offset + 1}-{min(length, self._offset + room)}/{length}" if length > room else ""
        return f" {_KEYS}   {where} {state} "


def _attribute(style: str) -> int:
    return {
        "plain": curses.A_NORMAL, "dim": curses.A_DIM, "bad": curses.color_pair(1),
        "head": curses.A_BOLD | curses.color_pair(2),
    }[style]  # fmt: skip
