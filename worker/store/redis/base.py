"""What the three stores on Redis share: connections by node, keys, and errors in the port's terms."""

from collections.abc import Sequence

from redis.exceptions import ReadOnlyError, ResponseError

from ... import keys
from ...errors import Fenced, StoreUnavailable
from .connect import Endpoint, endpoint, unavailable
from .connection import PipelinedConnection, Reply
from .lua import Command, LuaScripts, script

#: Ids in one script: the server does nothing else meanwhile, and 1,000 take it 1 to 3 ms.
SCRIPT_IDS = 1000
#: Bytes of bodies in one script or pipeline: bounds the server's memory when jobs are megabytes.
SCRIPT_BYTES = 8 * 1024 * 1024
#: Errors after which the same address will not do: the data has moved, or this is a replica now.
_MOVED = ("MOVED", "ASK", "CLUSTERDOWN", "MASTERDOWN")


class RedisStoreBase:
    """What the three stores share: connections by node, keys, and errors in the port's terms."""

    def __init__(self, url: str, *, timeout_s: float = 5.0, scripts: LuaScripts = script) -> None:
        self.url = url
        self._scripts = scripts
        self._endpoint: Endpoint = endpoint(url, timeout_s)
        self._timeout_s = timeout_s
        self._wires: dict[str, PipelinedConnection] = {}

    def close(self) -> None:
        """Drop every connection."""
        for wire in self._wires.values():
            wire.close()
        self._wires.clear()

    def call(self, stream: str, commands: Sequence[Command]) -> list[Reply]:
        """Replies in order; an error reply is an exception object in its place."""
        replies = self._wire(stream).call(commands)
        if any(isinstance(reply, ResponseError) and self._is_elsewhere(reply) for reply in replies):
            self.close()
            self._endpoint.forget()
        return replies

    def one(self, stream: str, command: Command) -> Reply:
        return checked(self.call(stream, [command])[0])

    def _wire(self, stream: str) -> PipelinedConnection:
        try:
            node = self._endpoint.node(stream)
        except Exception as error:  # a cluster that cannot be reached fails in many ways
            raise unavailable(error, "the cluster did not answer") from error
        if node not in self._wires:
            self._wires[node] = PipelinedConnection(self._endpoint, stream, self._scripts)
        return self._wires[node]

    @staticmethod
    def _is_elsewhere(reply: ResponseError) -> bool:
        moved = type(reply).__name__.removesuffix("Error").upper()
        return isinstance(reply, ReadOnlyError) or moved in _MOVED

    def retry_key(self, stream: str) -> str:
        return keys.retry_key(stream, cluster=self._endpoint.cluster)

    def dead_key(self, stream: str) -> str:
        return keys.dead_letter_key(stream, cluster=self._endpoint.cluster)

    def deaths_key(self, stream: str) -> str:
        return keys.deaths_key(stream, cluster=self._endpoint.cluster)

    def fence_key(self, stream: str) -> str:
        return keys.fence_key(stream, cluster=self._endpoint.cluster)


def checked(reply: Reply) -> Reply:
    """The reply; raises what the port promises where it is an error."""
    if not isinstance(reply, Exception):
        return reply
    if str(reply).startswith("FENCED"):
        raise Fenced(str(reply))
    raise StoreUnavailable(f"the job store refused: {type(reply).__name__}: {reply}") from reply


def is_no_group(reply: Reply) -> bool:
    """Whether the stream or its group is missing."""
    return isinstance(reply, ResponseError) and str(reply).startswith("NOGROUP")
