"""When a process that ended may be started again: at once after a good while, later after each quick end."""

#: First and longest pause before a start (seconds).
FIRST_S, LONGEST_S = 0.1, 30.0
#: Longest pause after an end that came when the process was ready: a handful of poisonous jobs in a row must
#: not keep the innocent ones behind them waiting for half a minute. A reader's start costs a quarter of a
#: second of a processor, so one that ends again and again takes about a third of one.
LONGEST_READY_S = 0.5
#: A process that was ready for this long was fine: its next end counts as the first.
_FINE_AFTER_S = 5.0


class Respawn:
    """The pause of one place. ``unready_ends`` counts ends in a row before the process was ready."""

    def __init__(self) -> None:
        self.unready_ends = 0
        self._quick_ends = 0
        self._mono_not_before_s = 0.0

    def ended(self, mono_now_s: float, *, was_ready: bool, lived_s: float) -> None:
        """Take note of an end; a first end after being ready costs no pause at all."""
        self.unready_ends = 0 if was_ready else self.unready_ends + 1
        self._quick_ends = 0 if was_ready and lived_s > _FINE_AFTER_S else self._quick_ends + 1
        # A worker that became ready and then died was most likely killed by its job, which is dealt with by
        # counting the job's deaths: only from the third quick end on is the pause worth its price.
        free_ends = 2 if was_ready else 0
        step = self._quick_ends - free_ends
        longest_s = LONGEST_READY_S if was_ready else LONGEST_S
        pause_s = 0.0 if step <= 0 else min(longest_s, FIRST_S * 2.0 ** (step - 1))
        self._mono_not_before_s = mono_now_s + pause_s

    def wait_s(self, mono_now_s: float) -> float:
        """Seconds until the next start."""
        return max(0.0, self._mono_not_before_s - mono_now_s)
