"""SVG picture of a command's output in a pseudo-terminal."""

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

_CELL_WIDTH, _LINE_HEIGHT, _MARGIN = 8.43, 18, 14
_BG, _FG = "#11151c", "#d7dce4"
_COLOURS = {
    "default": _FG, "red": "#ff7b7b", "green": "#4cc274", "cyan": "#6cc7e0", "blue": "#6ea0ff",
    "brown": "#f0ae4e", "magenta": "#b193ff", "white": "#ffffff", "black": _BG,
}  # fmt: skip
#: How long the command may take to end after the key q.
_QUIT_WITHIN_S = 10.0


def render_terminal(
    command: list[str], environment: dict[str, str], *, columns: int, rows: int, after_s: float
) -> str:
    """The screen after `after_s` seconds as an SVG document. The command is ended by the key q."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {**environment, "TERM": "linux", "LANG": "C.UTF-8"}
    popen = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        give_up_at = time.monotonic() + after_s
        while (left_s := give_up_at - time.monotonic()) > 0:
            if select.select([ours], [], [], left_s)[0]:
                stream.feed(os.read(ours, 65536))
        os.write(ours, b"q")
        svg = _svg(screen, columns, rows)
        popen.wait(_QUIT_WITHIN_S)
    finally:
        popen.kill()
        popen.wait()
        os.close(ours)
    return svg


def _svg(screen: pyte.Screen, columns: int, rows: int) -> str:
    width, height = columns * _CELL_WIDTH + 2 * _MARGIN, rows * _LINE_HEIGHT + 2 * _MARGIN
    body = "\n".join(part for row in range(rows) for part in _line(screen, row, columns))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace" '
        f'font-size="14">\n<rect width="100%" height="100%" rx="10" fill="{_BG}"/>\n'
        f"{body}\n</svg>\n"
    )


def _line(screen: pyte.Screen, row: int, columns: int) -> Iterator[str]:
    """One text element per run of cells with the same style, with an explicit width that any monospaced font
    can fill."""
    cells = [(column, screen.buffer[row][column]) for column in range(columns)]
    y = _MARGIN + (row + 1) * _LINE_HEIGHT - 4
    for _, run in groupby(cells, key=lambda cell: _style(cell[1])):
        cells_of_run = list(run)
        text = "".join(char.data for _, char in cells_of_run)
        fill, bold, reverse = _style(cells_of_run[0][1])
        x, width = _MARGIN + cells_of_run[0][0] * _CELL_WIDTH, len(cells_of_run) * _CELL_WIDTH
        if reverse:
            top = y - _LINE_HEIGHT + 4
            yield f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{_LINE_HEIGHT}" fill="{_FG}"/>'
        if text.strip():
            # Viewers would draw several ordinary blanks as one.
            visible = text.rstrip().replace(" ", "\N{NO-BREAK SPACE}")
            length = len(visible) * _CELL_WIDTH
            weight = ' font-weight="bold"' if bold else ""
            yield (
                f'<text x="{x:.1f}" y="{y}" fill="{_BG if reverse else fill}" textLength="{length:.1f}" '
                f'lengthAdjust="spacing"{weight}>{escape(visible)}</text>'
            )


def _style(char: Any) -> tuple[str, bool, bool]:
    return _COLOURS.get(char.fg, _FG), char.bold, char.reverse
