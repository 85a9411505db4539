"""Flow control: priorities, weights and limits of jobs, and the lanes in which jobs wait. Pure decisions."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from .conditions import SERIES, series_of
from .errors import ConfigurationError

#: Priority of a job that names none, or none that counts.
DEFAULT_PRIORITY = 5
HIGHEST_PRIORITY = 10
#: Most limits of a deployment; each costs a few commands a job of its type.
_MAX_LIMITS = 100
#: Most weights of a configuration file: they travel in one message between processes.
_MAX_WEIGHTS = 1000
_MAX_TENANT_CHARS = 64
#: Most starts of one rate limit: the server keeps the time of each.
_MAX_STARTS = 10_000
_MAX_CONCURRENCY = 1_000_000
_PRIORITIES = {str(number): number for number in range(HIGHEST_PRIORITY + 1)}
_PERIODS_MS = {"s": 1000, "min": 60_000, "h": 3_600_000, "day": 86_400_000}
_RATE = re.compile(r"([0-9]{1,5})/([0-9]{0,3})(s|min|h|day)")
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_METADATA_KEY = re.compile(r"metadata\..{1,100}", re.DOTALL)
_KEYS = ("tenant", "project", "global")
_METADATA = "metadata."


class Limit(msgspec.Struct, frozen=True, omit_defaults=True):
    """A limit of one job type: it applies to each value of ``key`` by itself.

    ``concurrency``: jobs that run at once; 0 for no such limit. ``starts`` in any ``per_ms`` milliseconds; 0
    for no such limit. ``key`` is tenant, project, global or metadata.NAME.
    """

    name: str
    type: str
    key: str
    concurrency: int = 0
    starts: int = 0
    per_ms: int = 0

    def value(self, job: "FlowHeader") -> str:
        """The value of the key for a job."""
        if self.key == "tenant":
            return job.tenant_id
        if self.key == "project":
            return f"{job.tenant_id}/{job.project_id}"
        if self.key == "global":
            return ""
        return (job.metadata or {}).get(self.key.removeprefix(_METADATA), "")

    @property
    def rate(self) -> str:
        """The rate as the configuration writes it; empty if there is none."""
        if not self.starts:
            return ""
        unit = max((one for one in _PERIODS_MS.items() if self.per_ms % one[1] == 0), key=lambda one: one[1])
        number = self.per_ms // unit[1]
        return f"{self.starts}/{'' if number == 1 else number}{unit[0]}"


class FlowConfig(msgspec.Struct, frozen=True):
    """Limits and weights of a deployment. ``version`` counts their changes on the server.

    ``origin`` identifies the configuration file that was applied last: a file is applied once.
    """

    version: int = 0
    limits: tuple[Limit, ...] = ()
    weights: dict[str, float] = {}
    origin: str = ""


class FlowHeader(msgspec.Struct, frozen=True, gc=False):
    """The fields of a job that flow control depends on."""

    type: str = ""
    tenant_id: str = ""
    project_id: str = ""
    metadata: dict[str, str] | None = None


class Lane(NamedTuple):
    """A queue of jobs that wait for the same turn and the same limits, oldest first."""

    type: str
    priority: int
    tenant_id: str
    #: Keys of limits: name, ``=``, value. The key of a series is the last one.
    limit_keys: tuple[str, ...] = ()

    @property
    def series(self) -> str:
        """The series whose jobs wait in the lane, one at a time; empty if the jobs are in none."""
        return self.limit_keys[-1] if self.limit_keys and self.limit_keys[-1].startswith(SERIES) else ""

    def encode(self) -> bytes:
        """Name of the lane in the store (see ``prelude_flow.lua``)."""
        type_name, tenant = self.type.encode(), self.tenant_id.encode()
        rank = HIGHEST_PRIORITY - self.priority
        name = b"%d/%s/%02d/%d/%s" % (len(type_name), type_name, rank, len(tenant), tenant)
        return name + msgspec.json.encode(self.limit_keys) if self.limit_keys else name

    @classmethod
    def decode(cls, name: bytes) -> "Lane":
        """The inverse of `encode`. Raises ValueError for anything else."""
        length, _, rest = name.partition(b"/")
        type_name, rest = rest[: int(length)], rest[int(length) + 1 :]
        rank, length, rest = rest.split(b"/", 2)
        tenant, keys = rest[: int(length)], rest[int(length) :]
        limit_keys = msgspec.json.decode(keys, type=tuple[str, ...]) if keys else ()
        return cls(type_name.decode(), HIGHEST_PRIORITY - int(rank), tenant.decode(), limit_keys)


_header = msgspec.json.Decoder(FlowHeader)


def priority_of(metadata: Mapping[str, str] | None) -> int:
    """The priority of a job, 0 to 10."""
    return _PRIORITIES.get(metadata.get("priority", ""), DEFAULT_PRIORITY) if metadata else DEFAULT_PRIORITY


def read_flow_header(data: bytes) -> FlowHeader:
    """The fields of a job that was admitted. Raises ValueError for other bytes."""
    return _header.decode(data)


class LaneRules:
    """Assigns jobs to lanes by the limits of one configuration."""

    def __init__(self, limits: Iterable[Limit] = ()) -> None:
        self._limits: dict[str, list[Limit]] = {}
        for limit in limits:
            self._limits.setdefault(limit.type, []).append(limit)
        # Encoded lanes by what they are made of: a backlog has few.
        self._plain: dict[tuple[str, int, str], bytes] = {}

    @property
    def limited_types(self) -> frozenset[str]:
        """Types that have a limit."""
        return frozenset(self._limits)

    def name_of(self, job: FlowHeader) -> bytes:
        """Name of the lane of a job."""
        parts = (job.type, priority_of(job.metadata), job.tenant_id)
        series = series_of(job.type, job.tenant_id, job.metadata)
        if series or job.type in self._limits:
            limits = self._limits.get(job.type, ())
            keys = (*(f"{one.name}={one.value(job)}" for one in limits), *([series] if series else []))
            return Lane(*parts, keys).encode()
        if (name := self._plain.get(parts)) is None:
            if len(self._plain) >= 10_000:
                self._plain.clear()
            name = self._plain[parts] = Lane(*parts).encode()
        return name

    def wait_key(self, job: FlowHeader, key: str) -> str | None:
        """The key that `RateLimited` makes wait: of a limit of the type, or of all jobs of the type or of its
        tenant. None where the type has no limit by such a key."""
        for limit in self._limits.get(job.type, ()):
            if limit.key == key:
                return f"{limit.name}={limit.value(job)}"
        if key == "global":
            return type_key(job.type)
        return tenant_key(job.type, job.tenant_id) if key == "tenant" else None


#: Key of `RateLimited` for a job that waits alone.
JOB_KEY = "job"


def type_key(type_name: str) -> str:
    """Key of all jobs of a type; no limit has it, because a limit's name is not empty."""
    return f"={type_name}"


def tenant_key(type_name: str, tenant_id: str) -> str:
    """Key of all jobs of a type and a tenant."""
    return f"=={len(type_name.encode())}={type_name}{tenant_id}"


def parse_limits(tables: Sequence[Mapping[str, Any]]) -> tuple[Limit, ...]:
    """The ``[[limit]]`` tables of the configuration file. Raises `ConfigurationError`."""
    limits = tuple(_parse_limit(table) for table in tables)
    names = [limit.name for limit in limits]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigurationError(f"[[limit]]: {', '.join(sorted(twice))} is given twice; set another name")
    if len(limits) > _MAX_LIMITS:
        raise ConfigurationError(f"[[limit]]: at most {_MAX_LIMITS}")
    return limits


def _parse_limit(table: Mapping[str, Any]) -> Limit:
    known = {"name", "type", "key", "concurrency", "rate"}
    if unknown := sorted(set(table) - known):
        raise ConfigurationError(f"[[limit]]: no field {unknown[0]!r}; there are {', '.join(sorted(known))}")
    type_name, key = table.get("type"), table.get("key", "global")
    if not isinstance(type_name, str) or not type_name:
        raise ConfigurationError('[[limit]]: say of which type, such as type = "shout"')
    if not isinstance(key, str) or (key not in _KEYS and not _METADATA_KEY.fullmatch(key)):
        raise ConfigurationError(f"[[limit]] key {key!r}: say tenant, project, global or metadata.NAME")
    name = table.get("name", f"{type_name}/{key}")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(f"[[limit]] name {name!r}: use letters, digits and _ . : / - only")
    concurrency = table.get("concurrency", 0)
    if type(concurrency) is not int or not 0 <= concurrency <= _MAX_CONCURRENCY:
        raise ConfigurationError(f"[[limit]] {name}: concurrency is a number of jobs")
    starts, per_ms = parse_rate(table["rate"], name) if "rate" in table else (0, 0)
    if not concurrency and not starts:
        raise ConfigurationError(f"[[limit]] {name}: give a concurrency above 0, a rate, or both")
    return Limit(name, type_name, key, concurrency, starts, per_ms)


def parse_rate(text: Any, name: str) -> tuple[int, int]:
    """Starts, and the milliseconds in which they may happen, of ``100/min``. Raises `ConfigurationError`."""
    found = _RATE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ConfigurationError(f'[[limit]] {name}: rate is "100/min", or per s, h, day, 10s')
    starts, number = int(found[1]), int(found[2] or "1")
    if not 0 < starts <= _MAX_STARTS or not number:
        raise ConfigurationError(
            f"[[limit]] {name}: a rate has 1 to {_MAX_STARTS} starts; use a shorter time"
        )
    return starts, number * _PERIODS_MS[found[3]]


def parse_weights(table: Mapping[str, Any]) -> dict[str, float]:
    """The ``[weights]`` table: tenant -> weight. Raises `ConfigurationError`."""
    if len(table) > _MAX_WEIGHTS or any(len(tenant) > _MAX_TENANT_CHARS for tenant in table):
        raise ConfigurationError(
            f"[weights]: at most {_MAX_WEIGHTS} tenants, of at most {_MAX_TENANT_CHARS} characters"
        )
    for tenant, weight in table.items():
        is_number = type(weight) in (int, float) and math.isfinite(weight) and 0.001 <= weight <= 1000
        if not is_number:
            raise ConfigurationError(f"[weights] {tenant}: a weight is a number from 0.001 to 1000")
    return {tenant: float(weight) for tenant, weight in table.items()}


def parse_flow(tables: Mapping[str, Any]) -> FlowConfig | None:
    """Limits and weights of the configuration file; None if it has neither table.

    Raises `ConfigurationError`.
    """
    if not tables:
        return None
    limit_tables, weight_table = tables.get("limit", []), tables.get("weights", {})
    is_list = isinstance(limit_tables, list) and all(isinstance(one, dict) for one in limit_tables)
    if not is_list or not isinstance(weight_table, dict):
        raise ConfigurationError("write limits as [[limit]] and weights as [weights]")
    config = FlowConfig(limits=parse_limits(limit_tables), weights=parse_weights(weight_table))
    origin = hashlib.sha256(msgspec.json.encode(config, order="deterministic")).hexdigest()[:16]
    return msgspec.structs.replace(config, origin=origin)
