"""Hand-over of questions about batches from HTTP threads to the reaper, which asks the job store."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

#: How long an HTTP thread waits for the supervisor's loop and the reaper.
_ANSWER_TIMEOUT_S = 2.0


class BatchAnswer(NamedTuple):
    """A batch as JSON (None: there is no such batch), or why the store does not answer."""

    batch: dict[str, Any] | None
    error: str = ""


class BatchMailbox:
    """Questions of HTTP threads. The supervisor's loop passes them on, because only it owns the sockets."""

    def __init__(self) -> None:
        #: Wakes the loop, once it runs.
        self.wake: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._number = 0
        #: Question number -> id of the batch; not passed on yet.
        self._asked: dict[int, str] = {}
        #: Question number -> answer, while a thread waits for it.
        self._answers: dict[int, BatchAnswer | None] = {}

    def request(self, id: str) -> BatchAnswer | None:
        """Wait for the answer (HTTP thread). Returns None if none comes in time."""
        with self._changed:
            self._number += 1
            number = self._number
            self._asked[number], self._answers[number] = id, None
            self.wake()
            self._changed.wait_for(lambda: self._answers[number] is not None, _ANSWER_TIMEOUT_S)
            self._asked.pop(number, None)
            return self._answers.pop(number)

    def take(self) -> dict[int, str]:
        """The questions that were not taken yet (loop)."""
        if not self._asked:
            return {}
        with self._changed:
            asked, self._asked = self._asked, {}
            return asked

    def answer(self, number: int, answer: BatchAnswer) -> None:
        """Give an answer to the thread that waits for it, if it still does (loop)."""
        with self._changed:
            if number in self._answers:
                self._answers[number] = answer
                self._changed.notify_all()
