"""Stores whose caller is killed at a random command, before or after the server has run it."""

import random
from collections.abc import Sequence

from jobworker.worker.store.redis.base import RedisStoreBase
from jobworker.worker.store.redis.connection import Reply
from jobworker.worker.store.redis.lua import Command


class Killed(BaseException):
    """The caller is killed."""


class DoomedStore(RedisStoreBase):
    """Mixed in before a store: about one command in ten kills its caller, before or after it has run."""

    rng = random.Random(0)

    def call(self, stream: str, commands: Sequence[Command]) -> list[Reply]:
        self._maybe_die()
        replies = super().call(stream, commands)
        self._maybe_die()
        return replies

    def _maybe_die(self) -> None:
        if self.rng.random() < 0.05:
            raise Killed
