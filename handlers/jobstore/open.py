"""Adapters of the job store for handlers, by URL; handlers that need none load no client library.

An empty URL gives an adapter in memory: a handler in the test harness runs without a job store. Each such
adapter is separate, so `open_rebuilds` and `open_erasures` refuse an empty URL: they would not see the writes
that `open_fence` admits.
"""

from .erasures import Erasures
from .fence import Fence, Rebuilds
from .records import Records


def open_fence(redis_url: str) -> Fence:
    """The write admission of a job store. Raises ConfigurationError for a URL that cannot be parsed."""
    if not redis_url:
        from .memory_fence import MemoryFence

        return MemoryFence()
    from .redis_fence import RedisFence

    return RedisFence(redis_url)


def open_rebuilds(redis_url: str) -> Rebuilds:
    """The rebuild state of a job store. Raises ConfigurationError for an empty URL too."""
    from .redis_fence import RedisFence

    return RedisFence(redis_url)


def open_erasures(redis_url: str) -> Erasures:
    """The deletions of a job store. Raises ConfigurationError for an empty URL too."""
    from .redis_fence import RedisFence

    return RedisFence(redis_url)


def open_records(redis_url: str) -> Records:
    """The records of a job store. Raises as `open_fence` does."""
    if not redis_url:
        from .memory_records import MemoryRecords

        return MemoryRecords()
    from .redis_records import RedisRecords

    return RedisRecords(redis_url)
