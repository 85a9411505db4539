"""What travels in the rings: jobs one way, failures the other. Success is a byte in the in-flight table."""

import msgspec

from .outcome import Failure


class JobFrame(msgspec.Struct, array_like=True, gc=False):
    """What the reader pushes: jobs for consecutive rows of the table, as (source, entry id, data)."""

    first_row: int
    jobs: list[tuple[int, bytes, bytes]]


class OutcomeFrame(msgspec.Struct, array_like=True, gc=False):
    """What the worker pushes for one job that failed; success is a byte in the table."""

    row: int
    failure: Failure
