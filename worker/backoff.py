"""How long a failed job waits: retry count, policy and a random source give a delay."""

import random
from typing import NamedTuple


class RetryPolicy(NamedTuple):
    """Times in seconds; ``jitter`` is the share by which a delay is spread either way."""

    max_retries: int = 3
    initial_s: float = 1.0
    max_s: float = 60.0
    multiplier: float = 2.0
    jitter: float = 0.1

    def delay_s(self, retry_count: int, rng: random.Random) -> float:
        """``initial * multiplier ** retry_count``, at most ``max``, spread by +- ``jitter``.

        ``retry_count`` is the new one, already counted up: the first retry waits initial * multiplier.
        """
        try:
            delay = self.initial_s * self.multiplier**retry_count
        except OverflowError:
            delay = self.max_s
        return min(delay, self.max_s) * (1.0 + self.jitter * rng.uniform(-1.0, 1.0))
