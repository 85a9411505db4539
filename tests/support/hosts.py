"""Several services on one store, as if each had a machine of its own, and what their jobs did."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from support.redis_servers import RedisServer
from support.service import Service, ending, handlers

#: Short, so that jobs of a killed host run again soon.
LEASE_S = 2.0


def host(folder: Path, server: RedisServer, name: str, **options: object) -> Service:
    (folder / name).mkdir()
    environment = {"TOYS_DIR": str(folder / name / "toys")}
    return Service(
        folder / name, handlers("Sleep", "Noop"), redis_url=server.url, instance=name, lease=LEASE_S,
        environment=environment, **options,
    )  # fmt: skip


@contextlib.contextmanager
def hosts(folder: Path, server: RedisServer, *names: str, **options: object) -> Iterator[list[Service]]:
    """Started services on one store, as if each had a machine of its own."""
    with contextlib.ExitStack() as stack:
        started = []
        for name in names:
            one = host(folder, server, name, **options)
            stack.enter_context(ending(one))
            started.append(one.start())
        yield started


def starts(services: list[Service]) -> dict[str, float]:
    return {event.id: event.mono_s for one in services for event in one.events("start")}


def overlaps(services: list[Service], tenant_of: dict[str, str]) -> dict[str, int]:
    """Most jobs of each tenant that ran at once. A run without an end ended with its process."""
    changes: list[tuple[float, int, str]] = []
    for service in services:
        for event in service.events("start"):
            changes.append((event.mono_s, 1, tenant_of[event.id]))
        for event in service.events("end"):
            changes.append((event.mono_s, -1, tenant_of[event.id]))
    now: dict[str, int] = {}
    most: dict[str, int] = {}
    for _, change, tenant in sorted(changes):
        now[tenant] = now.get(tenant, 0) + change
        most[tenant] = max(most.get(tenant, 0), now[tenant])
    return most
