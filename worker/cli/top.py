"""``jobworker top``: live dashboard in a terminal; a single snapshot as text if there is no terminal."""

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

from ..admin.deployment import Deployment, StreamTable
from ..admin.overview import Overview, open_poller
from ..admin.words import format_duration
from ..config.quantities import Duration
from ..errors import StoreUnavailable
from ..telemetry.log import redacted
from .common import AS_JSON, STREAMS, echo_json, is_terminal, verb_on_deployment
from .screen import ScreenLine, lines

#: Longest delay until a key press takes effect.
_KEY_TIMEOUT_MS = 100
#: Rates need two snapshots; for a single page of text they are taken this far apart.
_FIRST_INTERVAL_S = 1.0
_KEYS = "q quit   p freeze   ↑ ↓ PgUp PgDn scroll   space refresh"


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    command = AS_JSON(top)
    for option in (
        STREAMS,
        click.option("--once", is_flag=True, help="Print one snapshot as text, also on a terminal."),
        click.option("--interval", type=Duration(0.2), default=1.0, show_default=True,
                     help="Seconds between two snapshots."),
    ):  # fmt: skip
        command = option(command)
    verb_on_deployment(main)(command)


def top(deployment: Deployment, interval: float, once: bool, streams: tuple[str, ...], as_json: bool) -> None:
    """Watch the deployment live.

    Shows streams, rates, the jobs of every worker and the newest dead letters. Keys: q quits, p freezes the
    page, arrows and Page keys scroll, space refreshes at once. Without a terminal (or with --once or --json)
    one snapshot is printed. Workers and rates come from the services at --metrics-url; give one for each.

    \b
    jobworker top
    jobworker top --metrics-url http://a:9464 --metrics-url http://b:9464
    """
    poller = open_poller(deployment, StreamTable(streams))
    if as_json or once or not is_terminal(sys.stdout) or os.environ.get("TERM", "dumb") == "dumb":
        poller.snapshot()
        time.sleep(_FIRST_INTERVAL_S)  # rates need two snapshots
        overview = poller.snapshot()
        _print(overview, as_json)
        if overview.error:
            raise StoreUnavailable(overview.error)
        return
    with contextlib.suppress(locale.Error):  # ssh may send a locale that this host does not have
        locale.setlocale(locale.LC_ALL, "")
    _use_known_terminal()
    os.environ.setdefault("ESCDELAY", "25")
    curses.wrapper(_Dashboard(poller.snapshot, interval).run)


def to_json(overview: Overview) -> dict[str, Any]:
    """A snapshot for scripts; the names are part of the interface."""
    return {
        "streams": [{**source._asdict(), **depths._asdict()} for source, depths in overview.streams],
        "services": [
            {"url": one.url, "trouble": redacted(one.error)}
            | {key: value for key, value in one.status.items() if key not in ("metrics", "histograms")}
            for one in overview.services
        ],
        "totals": overview.totals,
        "rates": overview.rates,
        "p95_s": overview.p95_s,
        "paused": [
            {"kind": one.job_type, "wall_since_s": one.wall_since_s, "note": one.note}
            for one in overview.pauses
        ],
        "failures": [
            {key: value for key, value in asdict(letter).items() if key not in ("task", "raw", "details")}
            for letter in overview.letters
        ],
        "lanes": {stream: counts._asdict() for stream, counts in overview.lanes.items()},
        "limits": [
            {"stream": one.stream, "name": one.limit.name, "running": one.running, "waiting": one.waiting}
            for one in overview.limits
        ],
        "refused": [redacted(text) for text in overview.refused],
        "trouble": redacted(overview.error),
        "cron": [
            {"name": one.table.name, "next_s": one.next_s, "late_s": one.late_s, "paused": bool(one.pause)}
            for one in overview.cron
        ],
    }


def _print(overview: Overview, as_json: bool) -> None:
    if as_json:
        echo_json(to_json(overview))
        return
    width = int(os.environ.get("COLUMNS", 0)) or 200
    for line in lines(overview, width):
        click.echo(line.text)


def _use_known_terminal() -> None:
    """Fall back to xterm: ssh passes on the name of a terminal that this host may not know, and nearly all
    newer ones are compatible with xterm."""
    try:
        curses.setupterm()
    except curses.error:
        os.environ["TERM"] = "xterm"


class _Dashboard:
    """The live page. Snapshots are taken in a thread, so that keys work while a store does not answer."""

    def __init__(self, take_snapshot: Callable[[], Overview], interval_s: float) -> None:
        self._take_snapshot = take_snapshot
        self._interval_s = interval_s
        self._overview: Overview | None = None
        self._error: Exception | None = None
        self._mono_taken_s = 0.0
        self._refresh = threading.Event()
        self._frozen = False
        self._offset = 0

    def run(self, screen: "curses.window") -> None:
        """Draw until q is pressed."""
        with contextlib.suppress(curses.error):  # a terminal whose cursor cannot be hidden
            curses.curs_set(0)
        if curses.has_colors():
            curses.use_default_colors()
            for number, colour in enumerate((curses.COLOR_RED, curses.COLOR_CYAN), 1):
                curses.init_pair(number, colour, -1)
        screen.timeout(_KEY_TIMEOUT_MS)
        threading.Thread(target=self._poll, name="snapshots", daemon=True).start()
        while True:
            self._draw(screen)
            if self._error is not None:
                raise self._error
            if not self._handle_key(screen.getch(), screen.getmaxyx()[0]):
                return

    def _poll(self) -> None:
        while self._error is None:
            try:
                overview = self._take_snapshot()
            except Exception as error:  # raised by the main thread, which restores the terminal
                self._error = error
                return
            if not self._frozen:
                self._overview, self._mono_taken_s = overview, time.monotonic()
            self._refresh.wait(self._interval_s)
            self._refresh.clear()

    def _handle_key(self, key: int, height: int) -> bool:
        """Carry out a key press. False: quit."""
        steps = {curses.KEY_UP: -1, curses.KEY_DOWN: 1, ord("k"): -1, ord("j"): 1,
                 curses.KEY_PPAGE: 2 - height, curses.KEY_NPAGE: height - 2}  # fmt: skip
        self._offset = max(0, self._offset + steps.get(key, 0))
        if key == ord("p"):
            self._frozen = not self._frozen
        if key == ord(" "):
            self._refresh.set()
        return key not in (ord("q"), ord("Q"))

    def _draw(self, screen: "curses.window") -> None:
        height, width = screen.getmaxyx()
        page = lines(self._overview, width - 1) if self._overview else [ScreenLine("waiting for data …")]
        room = max(0, height - 2)
        self._offset = min(self._offset, max(0, len(page) - 1 - room))
        screen.erase()
        shown = [page[0], *page[1 + self._offset : 1 + self._offset + room]]
        for row, line in enumerate(shown[: height - 1]):
            screen.addstr(row, 0, line.text, _attribute(line.style))
        screen.addstr(height - 1, 0, self._footer(len(page) - 1, room)[: width - 1], curses.A_REVERSE)
        screen.refresh()

    def _footer(self, length: int, room: int) -> str:
        age_s = time.monotonic() - self._mono_taken_s if self._overview else 0.0
        is_stale = age_s > 2 * self._interval_s + 1
        state = "FROZEN" if self._frozen else f"{format_duration(age_s)} old" if is_stale else ""
        position = f"{self._offset + 1}-{min(length, self._offset + room)}/{length}" if length > room else ""
        return f" {_KEYS}   {position} {state} "


def _attribute(style: str) -> int:
    return {
        "plain": curses.A_NORMAL, "dim": curses.A_DIM, "bad": curses.color_pair(1),
        "head": curses.A_BOLD | curses.color_pair(2),
    }[style]  # fmt: skip
