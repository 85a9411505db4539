"""Batch handler: several jobs in one transaction, one outcome per job.

cd examples
jobworker-supervise --no-builtin-handlers --handler count_words=batch:CountWords
jobworker enqueue count_words --payload '"It was a dark night."' --count 100
sqlite3 jobworker-data/words.sqlite3 'SELECT count(*), sum(words) FROM counts'
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from jobworker.worker import Job, PermanentError, Settings

#: Several workers write to one file; a writer holds its lock for a few milliseconds.
_LOCK_WAIT_S = 10.0


class CountWords:
    """Counts the words of each payload. Upserts one row per job id, so a second run changes nothing."""

    max_batch = 100
    timeout = 30.0

    def setup(self, settings: Settings) -> None:
        """Open the database once per worker process. Raises sqlite3.Error where that fails."""
        folder = Path(settings.data_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(folder / "words.sqlite3", timeout=_LOCK_WAIT_S)
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS counts (job_id TEXT PRIMARY KEY, words INTEGER NOT NULL)"
        )
        #: Exported as the metric z_novel_words_total.
        self.counters = {"words": 0}

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        """One commit for all jobs; one outcome per job, in order. An exception here fails the whole batch."""
        outcomes: list[BaseException | None] = []
        rows: list[tuple[str, int]] = []
        for job in jobs:
            if isinstance(job.payload, str):
                rows.append((job.id, len(job.payload.split())))
                outcomes.append(None)
            else:
                outcomes.append(PermanentError("the payload must be a string"))
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO counts VALUES (?, ?)", rows)
        self.counters["words"] += sum(words for _, words in rows)
        return outcomes
