"""Every stream, group, ZSET and field name, in one place."""

from typing import NamedTuple

#: The one field of a stream entry; producers in other languages write it.
DATA_FIELD = b"data"


class Source(NamedTuple):
    """A stream and the consumer group that this service reads it by."""

    stream: str
    group: str


class Holder(NamedTuple):
    """One start of a service, as the job store records it beside the consumer's name.

    ``token`` is random for each start; all readers of one start share it. ``about`` tells people where the
    service runs. The record counts for ``lease_s`` seconds after its last renewal. ``predecessors`` are
    tokens of starts that are proven to be over.
    """

    token: str = "none"
    about: str = "a service that gave no details"
    lease_s: float = 30.0
    predecessors: tuple[str, ...] = ()


#: Of stores that are opened without one: all of them count as one start.
NO_HOLDER = Holder()

#: Consequence of a second group on a stream, and the remedy.
OTHER_GROUP = (
    "each group runs every job, but retries and dead letters are shared: a retry of one group runs in "
    "all groups; give each service a stream of its own, or XGROUP DESTROY a group that is unused"
)

#: Hash: type that was paused by hand -> since when and why, as JSON. One for all streams.
PAUSED_KEY = "jobworker:paused"

#: Hash: consumer name of a service -> its types and streams, as JSON. One for all streams.
SERVICES_KEY = "jobworker:services"


def _derived(prefix: str, stream: str, cluster: bool) -> str:
    """On a cluster the stream's name becomes the hash tag, so that both keys share one slot."""
    return f"{prefix}:{{{stream}}}" if cluster else f"{prefix}:{stream}"


def retry_key(stream: str, *, cluster: bool = False) -> str:
    """ZSET of jobs that wait for their next try; the score is the due time in unix seconds."""
    return _derived("retry", stream, cluster)


def dead_letter_key(stream: str, *, cluster: bool = False) -> str:
    """Stream of the jobs that were given up."""
    return _derived("dlq", stream, cluster)


def deaths_key(stream: str, *, cluster: bool = False) -> str:
    """Hash entry id -> how many workers have died under it; a field lives until its job is settled."""
    return _derived("deaths", stream, cluster)


def fence_key(stream: str, *, cluster: bool = False) -> str:
    """Hash consumer name -> epoch of the one reader that may settle under that name; and
    ``/holder/<consumer name>`` -> JSON record of its service, renewed while that lives."""
    return _derived("fence", stream, cluster)


def ready_key(stream: str, *, cluster: bool = False) -> str:
    """Hash: counts of the jobs that wait in lanes. Its companions' names begin with this and a slash (see
    ``prelude_flow.lua``)."""
    return _derived("ready", stream, cluster)


def cron_key(stream: str, *, cluster: bool = False) -> str:
    """Hash: the cron tables whose jobs go to the stream, with the last tick of each (see
    ``cron_publish.lua``)."""
    return _derived("cron", stream, cluster)


def shards_key(stream: str, *, cluster: bool = False) -> str:
    """Hash. Of a stream that is spread: the number of shards, what was moved into them, and their owners (see
    ``forward_take.lua``, ``share_shards.lua``). Of a shard: the last entry that was moved into it;
    a list beside it has the last ones."""
    return _derived("shards", stream, cluster)


def result_key(stream: str, job_id: str, *, cluster: bool = False) -> str:
    """String: the kept result of a job, as JSON (see ``results.py``)."""
    return f"{_derived('result', stream, cluster)}/{job_id}"


def batch_key(stream: str, id: str, *, cluster: bool = False) -> str:
    """Hash: a batch's counters on the stream and, on its home stream, its record (see
    ``prelude_batch.lua``)."""
    return f"{_derived('batch', stream, cluster)}/{id}"


def batches_key(stream: str, part: str, *, cluster: bool = False) -> str:
    """What is kept for all batches of a stream: ``jobs``, ``due``, ``open`` and ``finished`` (see
    ``prelude_batch.lua``)."""
    return f"{_derived('batches', stream, cluster)}/{part}"


def base_stream(key: str) -> str:
    """The stream that a derived key belongs to; any other key itself."""
    prefixes = ["retry:", "dlq:", "deaths:", "fence:", "ready:", "cron:", "shards:"]
    if key.startswith(("batch:", "batches:")) and "/" in key:
        prefixes += ["batch:", "batches:"]
        key = key.rpartition("/")[0]
    for prefix in prefixes:
        if key.startswith(prefix):
            stream = key.removeprefix(prefix)
            return stream[1:-1] if stream.startswith("{") and stream.endswith("}") else stream
    return key


def is_derived(key: str) -> bool:
    """Whether the service keeps a stream's retries, dead letters or other records under this key."""
    return base_stream(key) != key or key in (PAUSED_KEY, SERVICES_KEY)


def consumer_name(host: str, instance: str) -> str:
    """The consumer that one service reads as; stable over restarts, so that it finds its own again."""
    return f"{host}/{instance}"
