"""Runs a command in a terminal that nobody sees, and draws what stands on it as an SVG."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any
from xml.sax.saxutils import escape

import pyte

_CELL_WIDTH, _LINE_HEIGHT, _EDGE = 8.43, 18, 14
_BACK, _INK = "#11151c", "#d7dce4"
_COLOURS = {
    "default": _INK, "red": "#ff7b7b", "green": "#4cc274", "cyan": "#6cc7e0", "blue": "#6ea0ff",
    "brown": "#f0ae4e", "magenta": "#b193ff", "white": "#ffffff", "black": _BACK,
}  # fmt: skip
#: After a command was told to end by a key.
_END_WITHIN_S = 10.0


def drawn(command: list[str], environment: dict[str, str], *, columns: int, rows: int, for_s: float) -> str:
    """What it shows after so many seconds; then it is sent the key q."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {**environment, "TERM": "linux", "LANG": "C.UTF-8"}
    popen = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        give_up_at = time.monotonic() + for_s
        while (left_s := give_up_at - time.monotonic()) > 0:
            if select.select([ours], [], [], left_s)[0]:
                stream.feed(os.read(ours, 65536))
        os.write(ours, b"q")
        picture = _svg(screen, columns, rows)
        popen.wait(_END_WITHIN_S)
    finally:
        popen.kill()
        popen.wait()
        os.close(ours)
    return picture


def _svg(screen: pyte.Screen, columns: int, rows: int) -> str:
    width, height = columns * _CELL_WIDTH + 2 * _EDGE, rows * _LINE_HEIGHT + 2 * _EDGE
    body = "\n".join(part for row in range(rows) for part in _line(screen, row, columns))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace" '
        f'font-size="14">\n<rect width="100%" height="100%" rx="10" fill="{_BACK}"/>\n'
        f"{body}\n</svg>\n"
    )


def _line(screen: pyte.Screen, row: int, columns: int) -> Iterator[str]:
    """Stretches of cells that look alike; each is given its width, so that any monospaced font fits."""
    cells = [(column, screen.buffer[row][column]) for column in range(columns)]
    y = _EDGE + (row + 1) * _LINE_HEIGHT - 4
    for _, stretch in groupby(cells, key=lambda cell: _look(cell[1])):
        part = list(stretch)
        text = "".join(char.data for _, char in part)
        fill, bold, reverse = _look(part[0][1])
        x, width = _EDGE + part[0][0] * _CELL_WIDTH, len(part) * _CELL_WIDTH
        if reverse:
            top = y - _LINE_HEIGHT + 4
            yield f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{_LINE_HEIGHT}" fill="{_INK}"/>'
        if text.strip():
            kept = text.rstrip().replace(" ", "\N{NO-BREAK SPACE}")  # runs of others are drawn as one
            length = len(kept) * _CELL_WIDTH
            weight = ' font-weight="bold"' if bold else ""
            yield (
                f'<text x="{x:.1f}" y="{y}" fill="{_BACK if reverse else fill}" textLength="{length:.1f}" '
                f'lengthAdjust="spacing"{weight}>{escape(kept)}</text>'
            )


def _look(char: Any) -> tuple[str, bool, bool]:
    return _COLOURS.get(char.fg, _INK), char.bold, char.reverse
