"""Base class of the stores on Redis: connections by node, key names, errors in the port's terms."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from redis.exceptions import ClusterCrossSlotError, MovedError, ReadOnlyError, ResponseError

from ... import keys
from ...errors import Fenced, StoreRefused, StoreUnavailable
from ...keys import PAUSED_KEY, Source
from ..announcements import Announcement, parse
from ..ports import KeyFault
from .connect import Endpoint, endpoint, unavailable
from .connection import Begun, PipelinedConnection, Reply
from .features import Features
from .key_faults import concerns_one_stream, full_fault, is_full, type_faults
from .lua import Command, LuaScripts, script

#: Ids per script: the server runs nothing else meanwhile, and 1,000 take 1 to 3 ms.
SCRIPT_IDS = 1000
#: How long a caller waits for replicas. It does nothing else meanwhile.
_REPLICAS_TIMEOUT_S = 1.0
#: Bytes of jobs per script or pipeline: bounds the server's memory when jobs are megabytes.
SCRIPT_BYTES = 8 * 1024 * 1024
#: Keys that are hashed to reach every server of a cluster.
PROBES = 2000
#: Errors that need another address: the data has moved, this server is a replica now, or it has lost its
#: replicas, as a master that a failover has replaced.
_MOVED = ("MOVED", "ASK", "CLUSTERDOWN", "MASTERDOWN")
_LOST_REPLICAS = "NOREPLICAS"
#: Replies that only nodes of a cluster give.
_CLUSTER_REFUSALS = (MovedError, ClusterCrossSlotError)


Item = TypeVar("Item")

#: Most digits of a count of deaths. Other programs can write to the hash.
_COUNT_DIGITS = 6


class Question(NamedTuple):
    """Commands about a stream (or other key). One topic and stream have the same commands each time."""

    topic: str
    stream: str
    commands: Sequence[Command]


class RedisStoreBase:
    """One connection per server, key names, and the raw `call`. One thread uses an object."""

    def __init__(self, url: str, *, timeout_s: float = 5.0, scripts: LuaScripts = script) -> None:
        self.url = url
        self._scripts = scripts
        self._endpoint: Endpoint = endpoint(url, timeout_s)
        self._timeout_s = timeout_s
        self._connections: dict[str, PipelinedConnection] = {}
        # By topic and stream: what was asked ahead, and which of the replies are its own.
        self._asked: dict[tuple[str, str], tuple[Begun, int, int]] = {}

    def close(self) -> None:
        """Drop every connection."""
        self._asked.clear()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def call(self, stream: str, commands: Sequence[Command]) -> list[Reply]:
        """Run commands on the server of a stream (or other key); returns replies in order.

        An error reply is an exception object at its index. Raises `StoreUnavailable`.
        """
        return self._examined(self._connection(stream).call(commands))

    def begin_call(self, stream: str, commands: Sequence[Command]) -> Begun:
        """Send a few commands to the server of a stream without waiting. Raises `StoreUnavailable`."""
        return self._connection(stream).begin(commands)

    def finish_call(self, begun: Begun) -> list[Reply]:
        """The replies to commands that were begun, as of `call`; it waits for those that have not come."""
        return self._examined(begun.connection.finish(begun))

    def ask_ahead(self, questions: Iterable[Question]) -> None:
        """Send commands whose replies `answers` takes later. They share a round trip to each server.

        Replies of an earlier call that were not taken are dropped. Raises `StoreUnavailable`.
        """
        self._asked.clear()
        by_node: defaultdict[PipelinedConnection, list[Question]] = defaultdict(list)
        for question in questions:
            by_node[self._connection(question.stream)].append(question)
        for connection, asked in by_node.items():
            begun = connection.begin([command for one in asked for command in one.commands])
            start = 0
            for one in asked:
                stop = start + len(one.commands)
                self._asked[one.topic, one.stream] = begun, start, stop
                start = stop

    def answers(self, question: Question) -> list[Reply]:
        """As `call`; takes the replies of `ask_ahead` if it asked this."""
        asked = self._asked.pop((question.topic, question.stream), None)
        if asked is None:
            return self.call(question.stream, question.commands)
        begun, start, stop = asked
        return self.finish_call(begun)[start:stop]

    def _examined(self, replies: list[Reply]) -> list[Reply]:
        if not self._endpoint.cluster and any(isinstance(reply, _CLUSTER_REFUSALS) for reply in replies):
            raise StoreUnavailable(
                "the job store is a Redis Cluster: its URL must begin with redis+cluster:// or rediss+cluster://"
            )
        if any(isinstance(reply, ResponseError) and self._is_elsewhere(reply) for reply in replies):
            self.close()
            self._endpoint.forget()
        return replies

    def one(self, stream: str, command: Command) -> Reply:
        """Run one command; raises `StoreUnavailable` or `Fenced` for an error reply."""
        return checked(self.call(stream, [command])[0])

    def features(self, stream: str) -> Features:
        """Newer commands of the server of a stream. Raises `StoreUnavailable`."""
        return self._connection(stream).features()

    def one_key_a_server(self) -> list[str]:
        """A key for each server, so that a command with it reaches the server; one without a cluster.

        Raises `StoreUnavailable`.
        """
        if not self._endpoint.cluster:
            return [""]
        try:
            return list({self._endpoint.node(str(number)): str(number) for number in range(PROBES)}.values())
        except Exception as error:  # a cluster that cannot be reached fails in many ways
            raise unavailable(error, "the cluster did not answer") from error

    def _connection(self, stream: str) -> PipelinedConnection:
        try:
            node = self._endpoint.node(stream)
        except Exception as error:  # a cluster that cannot be reached fails in many ways
            raise unavailable(error, "the cluster did not answer") from error
        if node not in self._connections:
            self._connections[node] = PipelinedConnection(self._endpoint, stream, self._scripts)
        return self._connections[node]

    @staticmethod
    def _is_elsewhere(reply: ResponseError) -> bool:
        moved = type(reply).__name__.removesuffix("Error").upper()
        return isinstance(reply, ReadOnlyError) or moved in _MOVED or str(reply).startswith(_LOST_REPLICAS)

    def retry_key(self, stream: str) -> str:
        return keys.retry_key(stream, cluster=self._endpoint.cluster)

    def dead_key(self, stream: str) -> str:
        return keys.dead_letter_key(stream, cluster=self._endpoint.cluster)

    def deaths_key(self, stream: str) -> str:
        return keys.deaths_key(stream, cluster=self._endpoint.cluster)

    def fence_key(self, stream: str) -> str:
        return keys.fence_key(stream, cluster=self._endpoint.cluster)

    def ready_key(self, stream: str) -> str:
        return keys.ready_key(stream, cluster=self._endpoint.cluster)

    def shards_key(self, stream: str) -> str:
        return keys.shards_key(stream, cluster=self._endpoint.cluster)

    def result_key(self, stream: str, job_id: str) -> str:
        return keys.result_key(stream, job_id, cluster=self._endpoint.cluster)

    def key_faults(self, source: Source) -> list[KeyFault]:
        """The keys of a stream that cannot be worked with: of another type, full, or forbidden."""
        stream = source.stream
        dead_key = self.dead_key(stream)
        types = {
            stream: "stream",
            self.fence_key(stream): "hash",
            self.deaths_key(stream): "hash",
            self.retry_key(stream): "zset",
            dead_key: "stream",
            self.ready_key(stream): "hash",
            self.shards_key(stream): "hash",
            keys.batches_key(stream, "jobs", cluster=self._endpoint.cluster): "hash",
            keys.batches_key(stream, "due", cluster=self._endpoint.cluster): "hash",
        }
        replies = dict(zip(types, self.call(stream, [("TYPE", key) for key in types]), strict=True))
        faults = type_faults(types, replies, cluster=self._endpoint.cluster)
        for key in (stream, dead_key):
            if replies[key] == b"stream" and is_full(self.call(stream, [script("last_id", [key])])[0]):
                faults.append(full_fault(key, is_job_stream=key == stream, cluster=self._endpoint.cluster))
        return faults

    def pause_faults(self) -> list[KeyFault]:
        """As `key_faults`, for the key of the paused types."""
        reply = self.call(PAUSED_KEY, [("TYPE", PAUSED_KEY)])[0]
        return type_faults({PAUSED_KEY: "hash"}, {PAUSED_KEY: reply}, cluster=self._endpoint.cluster)


def checked(reply: Reply) -> Reply:
    """The reply, if it is no error. Raises `Fenced` or `StoreUnavailable` for one."""
    if not isinstance(reply, Exception):
        return reply
    if str(reply).startswith("FENCED"):
        raise Fenced(str(reply))
    text = f"the job store refused: {type(reply).__name__}: {reply}"
    raise (StoreRefused if concerns_one_stream(reply) else StoreUnavailable)(text) from reply


def wait_command(replicas: int) -> list[Command]:
    """The command that waits for replicas, behind others of its connection; none for 0 replicas."""
    return [("WAIT", replicas, round(_REPLICAS_TIMEOUT_S * 1000))] if replicas else []


def too_few(reply: Reply, wanted: int) -> bool:
    """Whether WAIT says that fewer replicas have the commands before it; also if the server refuses WAIT."""
    return isinstance(reply, Exception) or int(reply) < wanted


def death_count(value: bytes | None) -> int | None:
    """A stored count of worker deaths: 0 where there is none, None where the value is no such count."""
    if value is None:
        return 0
    return int(value) if value.isdigit() and len(value) <= _COUNT_DIGITS else None


def chunks(ids: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """The ids in parts that one script or command can take."""
    return (ids[at : at + SCRIPT_IDS] for at in range(0, len(ids), SCRIPT_IDS))


def chunks_by_size(items: Iterable[Item], size_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in parts that one pipeline can take: at most 1,000, and at most 8 MiB and one item."""
    part: list[Item] = []
    size = 0
    for item in items:
        part.append(item)
        size += size_of(item)
        if len(part) >= SCRIPT_IDS or size >= SCRIPT_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def pairs(flat: Sequence[Any]) -> dict[Any, Any]:
    """A flat reply of names and values as a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def announcements_in(reply: Reply) -> list[Announcement]:
    """The records of HGETALL; empty for any error: the key has another type, or this user may not read it."""
    return [] if isinstance(reply, ResponseError) else parse(pairs(reply))


def is_no_stream(reply: Reply) -> bool:
    """Whether XINFO found no such stream."""
    return isinstance(reply, ResponseError) and "no such key" in str(reply)


def is_no_group(reply: Reply) -> bool:
    """Whether the stream or its group is missing."""
    return isinstance(reply, ResponseError) and str(reply).startswith("NOGROUP")
