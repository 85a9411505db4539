"""Handler with a client of its own: an HTTP endpoint that may be down for a while.

cd examples
NOTIFY_URL=http://127.0.0.1:8080/hook \
    jobworker-supervise --no-builtin-handlers --handler notify=webhook:Notify
jobworker enqueue notify --payload '{"text": "chapter 7 is ready"}'
"""

import logging
import os

import httpx2

from jobworker.worker import ConfigurationError, Job, PermanentError, Settings, Unavailable

# The client logs every URL at INFO, query string included.
logging.getLogger("httpx2").setLevel(logging.WARNING)

#: Below `timeout`: a slow endpoint raises Unavailable here before the service kills the worker.
_REQUEST_S = 10.0


class Notify:
    """Posts each payload to NOTIFY_URL.

    While the endpoint is down, `Unavailable` opens the circuit breaker of this type: its jobs wait, one is
    tried now and then, and no retry is used up. The receiver gets the job's key as an idempotency key.
    """

    timeout = 30.0

    def setup(self, settings: Settings) -> None:
        """Make the client once per worker process; it keeps its connection between jobs."""
        self._url = os.environ.get("NOTIFY_URL", "")
        if not self._url:
            raise ConfigurationError("NOTIFY_URL is not set: name the endpoint to post to")
        self._client = httpx2.Client(timeout=_REQUEST_S)

    def healthy(self) -> None:
        """Asked while the worker is idle; raise, and /readyz reports this type as not ready."""
        try:
            self._client.head(self._url)
        except httpx2.TransportError as error:
            raise Unavailable(f"the endpoint does not answer: {error}") from error

    def handle(self, job: Job) -> None:
        """Post one job. Raises Unavailable while the endpoint is down, PermanentError where it rejects it."""
        try:
            answer = self._client.post(self._url, json=job.payload, headers={"Idempotency-Key": job.key})
        except httpx2.TransportError as error:
            raise Unavailable(f"the endpoint does not answer: {error}") from error
        if answer.status_code == 429 or answer.status_code >= 500:
            raise Unavailable(f"the endpoint answers HTTP {answer.status_code}")
        if answer.status_code >= 400:
            raise PermanentError(f"the endpoint rejects the payload: HTTP {answer.status_code}")
