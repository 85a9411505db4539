"""Progress of an import or export on standard error: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import click

from jobworker.worker.cli.common import echo_line, is_terminal

#: Seconds between two lines where standard error is no terminal.
_LINE_EVERY_S = 10.0
_STEPS = 1000


class ShowShare(Protocol):
    """Shows a share from 0 to 1, and facts in words."""

    def __call__(self, share: float, text: str) -> None: ...


@contextmanager
def share_shown(label: str) -> Iterator[ShowShare]:
    """Shows the share of what is done."""
    if not is_terminal(sys.stderr):
        yield _Lines(label).share
        return
    with click.progressbar(
        length=_STEPS, label=label, file=sys.stderr, item_show_func=lambda text: text or ""
    ) as bar:

        def show(share: float, text: str) -> None:
            # It never moves back: another job may have joined the batch.
            bar.update(max(0, int(share * _STEPS) - bar.pos), text)

        yield show


class _Lines:
    def __init__(self, label: str) -> None:
        self._label = label
        self._mono_due_s = time.monotonic() + _LINE_EVERY_S

    def share(self, share: float, text: str) -> None:
        self.line(f"{share:.1%}, {text}")

    def line(self, text: str) -> None:
        if time.monotonic() >= self._mono_due_s:
            echo_line(f"{self._label}: {text}", err=True)
            self._mono_due_s = time.monotonic() + _LINE_EVERY_S


@contextmanager
def count_shown(label: str) -> Iterator["ShowCount"]:
    """Shows a number whose end is unknown."""
    terminal = is_terminal(sys.stderr)
    lines, last_s = _Lines(label), 0.0

    def show(count: int) -> None:
        nonlocal last_s
        if not terminal:
            lines.line(f"{count:,} rows")
        elif time.monotonic() - last_s > 0.2:
            last_s = time.monotonic()
            click.echo(f"\r{label}: {count:,} rows", err=True, nl=False)

    yield show
    if terminal and last_s:
        click.echo("\r\x1b[K", err=True, nl=False)


class ShowCount(Protocol):
    """Shows a number of rows."""

    def __call__(self, count: int) -> None: ...
