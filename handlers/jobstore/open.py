"""Opens what handlers ask of the job store: the adapter that a URL calls for, behind its port.

With no URL it is the one in memory, within this process only. Adapters are imported when they are needed: a
handler that asks for none loads no client library.
"""

from .fence import Fence, Rebuilds
from .records import Records


def open_fence(redis_url: str) -> Fence:
    """The fence on a job store."""
    if not redis_url:
        from .memory_fence import MemoryFence

        return MemoryFence()
    from .redis_fence import RedisFence

    return RedisFence(redis_url)


def open_rebuilds(redis_url: str) -> Rebuilds:
    """The rebuilds of a job store."""
    if not redis_url:
        from .memory_fence import MemoryFence

        return MemoryFence()
    from .redis_fence import RedisFence

    return RedisFence(redis_url)


def open_records(redis_url: str) -> Records:
    """The records of a job store."""
    if not redis_url:
        from .memory_records import MemoryRecords

        return MemoryRecords()
    from .redis_records import RedisRecords

    return RedisRecords(redis_url)
