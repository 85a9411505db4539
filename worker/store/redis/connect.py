"""Redis connections from a URL: single server, Sentinel, Cluster, TLS, Unix socket.

Every connection has explicit time limits and counts the bytes that it receives. The client library's errors
become `StoreUnavailable`.
"""

import functools
import math
import socket
from typing import Any, Protocol

import redis
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import RedisError

from ...errors import AnswerTooLarge, ConfigurationError, StoreUnavailable
from ...urls import RedisUrl, parse_redis_url
from .discovery import find_master, living_nodes

try:
    from redis.driver_info import DriverInfo
except ImportError:  # before version 7.2, which looks its version up once
    _DRIVER: dict[str, Any] = {}
else:
    # Otherwise each connection looks the version up in the metadata of the installed packages.
    _DRIVER = {"driver_info": DriverInfo(lib_version=redis.__version__)}

#: Bytes per system call, and the size of a buffer that each connection keeps. 256 KiB were not faster.
_SOCKET_READ_BYTES = 64 * 1024
#: TCP keepalive: seconds of silence before the first probe, seconds between probes, number of probes.
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 10, 5, 3

#: The library gives this class no types.
_ClusterNode: Any = ClusterNode

#: A connection of the client library with the attribute ``metered_socket``. The library's own types are too
#: weak to check our calls.
Connection = Any


class MeteredSocket:
    """Socket that raises `AnswerTooLarge` once more bytes have been received than `allow` permits."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._budget_bytes = self._left_bytes = math.inf

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def allow(self, budget_bytes: float) -> None:
        """Count from now on, up to `budget_bytes`. There is no limit before the first call."""
        self._budget_bytes = self._left_bytes = budget_bytes

    def recv_into(self, *arguments: Any) -> int:
        """As the socket's own. The client library receives by no other method."""
        received = int(self._socket.recv_into(*arguments))
        self._left_bytes -= received
        if self._left_bytes < 0:
            raise AnswerTooLarge(f"more than {self._budget_bytes} bytes")
        return received


class _Metering:
    """Mixin for the library's connection classes.

    It overrides `_connect`, the abstract method by which those classes open a TCP, TLS or Unix socket. So the
    library's parser reads from our socket, and we wait on it without the library's private attributes.
    """

    metered_socket: MeteredSocket

    def _connect(self) -> MeteredSocket:
        self.metered_socket = MeteredSocket(super()._connect())  # type: ignore[misc]
        return self.metered_socket


@functools.cache
def _metering(connection_class: type) -> type:
    return type(f"Metering{connection_class.__name__}", (_Metering, connection_class), {})


class Endpoint(Protocol):
    """Location of the data. ``cluster`` says whether derived keys need a hash tag."""

    cluster: bool

    def node(self, key: str) -> str:
        """Name of the server that holds the key: keys of one node may share a connection."""

    def connection(self, key: str) -> Connection:
        """A new connection, not yet opened, to the server that holds the key."""

    def forget(self) -> None:
        """Resolve the servers again at the next use: one has failed or moved."""


def endpoint(url: str, timeout_s: float) -> Endpoint:
    """Endpoint of a URL, for which `parse_redis_url` lists the forms.

    Nothing is contacted yet. Raises `ConfigurationError` for a URL that cannot be parsed; its text never
    shows the password.
    """
    if not url:
        raise ConfigurationError("the URL of the job store is empty")
    parsed = parse_redis_url(url)
    options = _limits(timeout_s) | parsed.tls_arguments()
    options |= {"db": parsed.db, "username": parsed.username, "password": parsed.password}
    if parsed.kind == "unix":
        return _Single(redis.UnixDomainSocketConnection, options | {"path": parsed.path})
    options |= _keepalive(timeout_s)
    match parsed.kind:
        case "cluster":
            del options["db"]
            return _Cluster(list(parsed.hosts), options | ({"ssl": True} if parsed.secure else {}))
        case "sentinel":
            return _Sentinel(parsed, options)
        case _:
            ((host, port),) = parsed.hosts
            kind = redis.SSLConnection if parsed.secure else redis.Connection
            return _Single(kind, options | {"host": host, "port": port})


def unavailable(error: Exception, doing: str) -> StoreUnavailable:
    """The port's error for any error of the client library."""
    return StoreUnavailable(f"{doing}: {type(error).__name__}: {error}")


def has_ended(connection: Connection) -> bool:
    """Whether the server closed the connection. Between replies a healthy one has nothing to read."""
    try:
        return bool(connection.can_read(timeout=0))
    except (RedisError, OSError):
        return True


def require_version(info: bytes) -> None:
    """Check the answer of INFO SERVER: Redis from 7.0, Valkey from 8. Raises `ConfigurationError`."""
    fields = dict(line.split(b":", 1) for line in info.split(b"\r\n") if b":" in line)
    if b"valkey_version" in fields:
        name, version, least = "Valkey", fields[b"valkey_version"], 8
    else:
        name, version, least = "Redis", fields.get(b"redis_version", b"0"), 7
    if int(version.split(b".")[0]) < least:
        raise ConfigurationError(f"{name} {version.decode()} is too old: Redis 7.0 or Valkey 8 is needed")


def _limits(timeout_s: float) -> dict[str, Any]:
    return {
        "socket_timeout": timeout_s,  # always explicit: the client's own default cuts blocking reads
        "socket_connect_timeout": timeout_s,
        "protocol": 2,
        "client_name": "jobworker",
        **_DRIVER,
    }


def _keepalive(timeout_s: float) -> dict[str, Any]:
    return {
        "socket_keepalive": True,
        "socket_keepalive_options": {
            socket.TCP_KEEPIDLE: _KEEPALIVE_IDLE_S,
            socket.TCP_KEEPINTVL: _KEEPALIVE_INTERVAL_S,
            socket.TCP_KEEPCNT: _KEEPALIVE_PROBES,
            socket.TCP_USER_TIMEOUT: int(timeout_s * 1000),
        },
    }


def _from_pool(pool: redis.ConnectionPool) -> Connection:
    # Not make_connection(): the pool would count connections that it never gets back.
    arguments = pool.connection_kwargs | {"socket_read_size": _SOCKET_READ_BYTES}
    return _metering(pool.connection_class)(**arguments)


class _Single:
    """One server, over TCP, TLS or a Unix socket."""

    cluster = False

    def __init__(self, connection_class: Any, options: dict[str, Any]) -> None:
        self._pool = redis.ConnectionPool(connection_class=connection_class, **options)

    def node(self, key: str) -> str:
        return ""

    def connection(self, key: str) -> Connection:
        return _from_pool(self._pool)

    def forget(self) -> None:
        """Nothing to do: the host name is resolved at every connect."""


class _Sentinel:
    """The master of a Sentinel group; the sentinels are asked at the first use and after `forget`."""

    cluster = False

    def __init__(self, parsed: RedisUrl, options: dict[str, Any]) -> None:
        self._sentinels = list(parsed.hosts)
        self._name = parsed.master
        self._options = options | ({"ssl": True} if parsed.secure else {})
        # The URL's database, user and password are those of the master, not of the sentinels.
        self._sentinel_options = self._options | {
            "db": 0,
            "username": parsed.sentinel_username,
            "password": parsed.sentinel_password,
        }
        self._kind = redis.SSLConnection if parsed.secure else redis.Connection
        self._pool: redis.ConnectionPool | None = None

    def node(self, key: str) -> str:
        return ""

    def connection(self, key: str) -> Connection:
        if self._pool is None:
            host, port = find_master(self._sentinels, self._name, self._sentinel_options, self._options)
            options = {key: value for key, value in self._options.items() if key != "ssl"}
            self._pool = redis.ConnectionPool(connection_class=self._kind, host=host, port=port, **options)
        return _from_pool(self._pool)

    def forget(self) -> None:
        self._pool = None


class _Cluster:
    """Redis Cluster; the slot map is fetched at the first use and after `forget`."""

    cluster = True

    def __init__(self, hosts: list[tuple[str, int]], options: dict[str, Any]) -> None:
        self._hosts = hosts
        self._options = options
        self._client: Any = None

    def _owner(self, key: str) -> tuple[Any, Any]:
        if self._client is None:
            # The library asks one node after the other, and waits for a hung one as long as for any command.
            living = living_nodes(self._hosts, self._options)
            nodes = [_ClusterNode(host, port) for host, port in living]
            self._client = RedisCluster(startup_nodes=nodes, **self._options)
        return self._client, self._client.get_node_from_key(key)

    def node(self, key: str) -> str:
        return str(self._owner(key)[1].name)

    def connection(self, key: str) -> Connection:
        client, node = self._owner(key)
        return _from_pool(client.get_redis_connection(node).connection_pool)

    def forget(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
