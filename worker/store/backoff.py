"""Reconnect backoff of reader and reaper after a failed call to the job store."""

import random

#: First and longest wait (seconds). The longest is short enough to reconnect within about a second.
FIRST_S, MAX_S = 0.05, 1.0


class ReconnectBackoff:
    """Exponential wait with jitter, so that many hosts do not reconnect in the same instant."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._base_s = FIRST_S

    def reset(self) -> None:
        """Start again with the shortest wait, after a successful call."""
        self._base_s = FIRST_S

    def next_wait_s(self) -> float:
        """Seconds to wait after one more failure: 50 to 100 % of a value that doubles up to `MAX_S`."""
        wait_s = self._base_s * self._rng.uniform(0.5, 1.0)
        self._base_s = min(MAX_S, 2.0 * self._base_s)
        return wait_s
