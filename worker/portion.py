"""How many entries to ask for at once, so that what comes back stays bounded in bytes."""

from collections.abc import Sequence

from .store import Entry

#: Entries of one answer: enough to spread a round trip over.
_MOST_ENTRIES = 1024
#: An answer is to hold about so many bytes.
_ANSWER_BYTES = 4 * 1024 * 1024
#: Asked for while nothing is known: as many of the largest jobs as a host can well hold.
_FIRST_ENTRIES = 8


class Portion:
    """For one stream. Grows while entries are small; after a large one as many are asked for as fit."""

    def __init__(self) -> None:
        self.entries = _FIRST_ENTRIES

    def learn(self, answer: Sequence[Entry]) -> None:
        """Go by the largest entry of the newest answer: large jobs come in runs, and are not to be many."""
        largest = max(1, max([len(entry.data or b"") for entry in answer], default=1))
        self.entries = max(1, min(_MOST_ENTRIES, 2 * self.entries, _ANSWER_BYTES // largest))

    @property
    def largest(self) -> bool:
        """Whether jobs have been so small that it is as large as it gets."""
        return self.entries == _MOST_ENTRIES

    def overrun(self) -> None:
        """An answer was too large to be taken: one at a time until more is known."""
        self.entries = 1
