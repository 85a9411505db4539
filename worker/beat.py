"""The beat: a time grid on which the processes of an idle service wake.

A process that wakes finds the caches of the processor cold, which costs more than the little that it does.
Processes that wake together share the code and the data, and their server wakes once for all of them.
"""

import math

#: Time between two beats (seconds). What operators change is read at each beat and counts within a second.
BEAT_S = 0.9
#: What is due at a beat may be done this much earlier (seconds): a blocking read ends up to 0.1 s after the
#: time that it asks for.
EARLY_S = 0.13


def next_beat_s(mono_s: float, beats: int = 1) -> float:
    """The time of the next beat, or of a later one (monotonic seconds, as all processes of a host count)."""
    return (math.floor((mono_s + EARLY_S) / BEAT_S) + beats) * BEAT_S
