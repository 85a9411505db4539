"""Common wake-ups: the times at which the processes of an idle service do what is due at intervals.

A process that wakes finds the caches of the processor cold, which costs more than the little that it does.
Processes that wake together share the code and the data, and their server wakes once for all of them.
"""

import math

#: Time between two wake-ups (seconds). What operators change is read at each and counts within a second.
WAKEUP_EVERY_S = 0.9
#: What is due at a wake-up may be done this much earlier (seconds): a blocking read ends up to 0.1 s after
#: the time that it asks for.
EARLY_S = 0.13


def next_wakeup_s(mono_s: float, number: int = 1) -> float:
    """Time of the next wake-up, or of a later one (monotonic seconds, which a host's processes share)."""
    return (math.floor((mono_s + EARLY_S) / WAKEUP_EVERY_S) + number) * WAKEUP_EVERY_S
