"""A finding of `jobworker doctor`."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report. ``level``: ok, note or wrong; ``do``: the remedy."""

    level: str
    subject: str
    says: str
    do: str = ""
