"""Handlers that would give every secret away: they log, print and raise what they were set up with."""

import logging
import os

from jobworker.handlers.settings import HandlerSettings
from jobworker.worker import Job

log = logging.getLogger("blabber")


class Blabber:
    """Says what it knows, in every way there is."""

    def setup(self, settings: HandlerSettings) -> None:
        """Take the settings along."""
        self._secrets = [settings.redis_url, settings.milvus_token, settings.postgres_dsn]
        self._secrets.append(os.environ.get("JOBWORKER_LLM_KEY", ""))
        log.info("set up with %s", self._secrets, extra={"settings": settings, "all": self._secrets})

    def handle(self, job: Job) -> None:
        """Fail with all of it."""
        try:
            raise ConnectionError(" ".join(self._secrets))
        except ConnectionError:
            log.exception("lost", extra={"payload": job.payload})
        log.warning("flood")
        raise ValueError(f"refused: {self._secrets}")
