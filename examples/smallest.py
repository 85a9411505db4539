"""Smallest handler: one method, one job. Return when the job is done, raise when it is not.

cd examples
jobworker-supervise --no-builtin-handlers --handler greet=smallest:Greet
jobworker enqueue greet --payload '{"name": "Ada"}'
"""

import logging

from jobworker.worker import Job, PermanentError

log = logging.getLogger("examples.greet")


class Greet:
    """Logs a greeting. Delivery is at least once: a second run logs the same line again."""

    def handle(self, job: Job) -> None:
        """Greet one person. Raises PermanentError for a payload that no retry can repair."""
        name = job.payload.get("name") if isinstance(job.payload, dict) else None
        if not isinstance(name, str) or not name:
            raise PermanentError('the payload must be {"name": "..."}')
        log.info("greeting", extra={"text": f"Hello, {name}!"})
