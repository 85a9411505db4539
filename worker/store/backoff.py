"""Backoff of reader and reaper after a failed call to the job store, or after a refusal of one stream."""

import random

#: First and longest wait (seconds). The longest is short enough to reconnect within about a second.
FIRST_S, MAX_S = 0.05, 1.0


class ReconnectBackoff:
    """Exponential wait with jitter, so that many hosts do not reconnect in the same instant."""

    def __init__(self, rng: random.Random, first_s: float = FIRST_S, max_s: float = MAX_S) -> None:
        self._rng = rng
        self._first_s = self._base_s = first_s
        self._max_s = max_s

    def reset(self) -> None:
        """Start again with the shortest wait, after a successful call."""
        self._base_s = self._first_s

    def next_wait_s(self) -> float:
        """Seconds to wait after one more failure: 50 to 100 % of a value that doubles up to ``max_s``."""
        wait_s = self._base_s * self._rng.uniform(0.5, 1.0)
        self._base_s = min(self._max_s, 2.0 * self._base_s)
        return wait_s
