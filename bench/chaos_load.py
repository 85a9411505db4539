"""Load of the chaos test: a seeded mix of jobs, and a producer that records what the server confirmed."""

import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import orjson
import redis
from chaos_events import effect_key

STREAM, PROBE_STREAM, GROUP = "chaos:jobs", "chaos:probes", "chaos"
ONE, MANY = "chaos_one", "chaos_many"
#: Type and tenant of the probes. Types and tenants whose jobs kill worker after worker are slowed on purpose.
PROBE, _PROBE_TENANT = "chaos_probe", "t99"
#: Share of each fate; other jobs succeed. Flaky jobs fail once, exhausted ones at every try.
SHARES = {"flaky": 0.045, "exhausted": 0.005, "permanent": 0.01, "malformed": 0.01, "poison": 0.005}
#: Share of the jobs with a batch handler.
_MANY_SHARE = 0.25
_TENANTS = 20
#: Jobs of one pipeline: a producer that waits for each answer never builds a backlog.
_AT_ONCE = 16
#: Pause before refused jobs are sent again.
_REFUSED_PAUSE_S = 0.1
#: Socket timeout of the producer.
_ANSWER_WITHIN_S = 5.0

#: Jobs of a tenant with the type ONE that run at once, and starts of the type MANY in a second.
AT_ONCE, STARTS = 2, 100
#: Configuration file of the services: with it, jobs of both types go through lanes.
LIMITS = f"""
[[limit]]
type = "{ONE}"
key = "tenant"
concurrency = {AT_ONCE}

[[limit]]
type = "{MANY}"
rate = "{STARTS}/s"

[weights]
t01 = 3
"""

Fields = dict[bytes, bytes]
Client = Any


class Flow(NamedTuple):
    """What a job asks of flow control: names of its idempotency key, its series and its batch, a delay, and
    whether it is cancelled and its result is kept."""

    key: str = ""
    series: str = ""
    batch: str = ""
    delay_s: float = 0.0
    cancel: bool = False
    keep: bool = False


class Planned(NamedTuple):
    """Planned job; ``effect`` is the key of its effect, empty if it must not succeed."""

    id: str
    fate: str
    effect: str
    fields: Fields
    kind: str = ""
    tenant: str = ""
    flow: Flow = Flow()

    @property
    def must_run(self) -> bool:
        """Whether it succeeds, whatever other jobs do, and is not cancelled."""
        return bool(self.effect) and not (self.flow.key or self.flow.series or self.flow.cancel)


def plan(jobs: int, rng: random.Random) -> list[Planned]:
    """The jobs, in the order of sending."""
    fates = [fate for fate, share in SHARES.items() for _ in range(max(1, round(jobs * share)))][:jobs]
    fates += ["ok"] * (jobs - len(fates))
    rng.shuffle(fates)
    return [_planned(f"job-{number:06d}", fate, number, rng) for number, fate in enumerate(fates)]


def probe(number: int) -> Planned:
    """A job whose start shows that the system works."""
    return _job(f"probe-{number:06d}", "ok", PROBE, _PROBE_TENANT, "probe")


def _planned(id: str, fate: str, number: int, rng: random.Random) -> Planned:
    if fate == "malformed":
        return Planned(id, *_MALFORMED[number % len(_MALFORMED)](id))
    kind = MANY if rng.random() < _MANY_SHARE else ONE
    tenant = "t00" if rng.random() < 0.5 else f"t{rng.randrange(1, _TENANTS):02d}"
    text = f"chapter {rng.randrange(10**9)}: 風雪夜歸人"
    return _job(id, fate, kind, tenant, text, priority=number % 11)


def _job(id: str, fate: str, kind: str, tenant: str, text: str, priority: int = 5) -> Planned:
    wire = {"id": id, "type": kind, "tenant_id": tenant, "project_id": "p1",
            "payload": {"fate": fate, "text": text},
            "metadata": {"request_id": id, "priority": str(priority)},
            "created_at": "2026-01-02T10:00:00.123Z"}  # fmt: skip
    succeeds = fate in ("ok", "flaky")
    return Planned(
        id, fate, effect_key(tenant, id, text) if succeeds else "",
        {b"data": orjson.dumps(wire)}, kind, tenant,
    )  # fmt: skip


def _bad(text: str) -> Any:
    """A factory of malformed jobs; ``@`` is replaced by the id, which identifies the dead letter."""
    return lambda id: ("malformed", "", {b"data": text.replace("@", id).encode("latin-1")})


#: Kinds of malformed jobs, used in turn.
_MALFORMED: Sequence[Any] = (
    _bad('{"id": "@", '),
    _bad('["@"]'),
    _bad('{"type": "chaos_one", "payload": "@"}'),
    _bad('{"id": "@", "type": 5}'),
    _bad('{"id": "@\xff", "type": "chaos_one"}'),
    _bad('{"id": "@", "type": "chaos_one", "payload": NaN}'),
    _bad('{"id": "@", "id": "@", "type": "chaos_one"}'),
    _bad('{"id": "@", "type": "chaos_one", "metadata": [1]}'),
    lambda id: ("malformed", "", {b"body": id.encode()}),
    lambda id: ("unknown_type", "", {b"data": orjson.dumps({"id": id, "type": "unknown"})}),
)


@dataclass
class Ledger:
    """Sent jobs: ``confirmed`` maps ids to entry ids; ``unanswered`` ones may or may not be stored.

    ``wall_due_s``: earliest starts (unix seconds); ``batches``: numbers of jobs; ``cancels``: what the store
    said of a cancelled job, and ``mono_cancelled_s``, when. ``mono_sent_s``: when a job was first sent.
    """

    planned: dict[str, Planned] = field(default_factory=dict)
    confirmed: dict[str, str] = field(default_factory=dict)
    unanswered: set[str] = field(default_factory=set)
    refusals: int = 0
    wall_due_s: dict[str, float] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
    cancels: dict[str, str] = field(default_factory=dict)
    mono_cancelled_s: dict[str, float] = field(default_factory=dict)
    mono_sent_s: dict[str, float] = field(default_factory=dict)


class Sender(Protocol):
    """Sends jobs in other ways than the producer does, see `chaos_flow`."""

    def stamp(self, job: Planned) -> Fields: ...
    def send(self, jobs: Sequence[Planned]) -> None: ...
    def cancel(self, jobs: Sequence[Planned]) -> None: ...
    def close(self) -> None: ...


class Producer(threading.Thread):
    """Thread that sends bursts directly to the server, and continues after errors.

    With a ``sender``, that one sends the jobs of batches, and cancels jobs after each burst.
    """

    def __init__(
        self, url: str, jobs: Sequence[Planned], ledger: Ledger, sender: Sender | None = None
    ) -> None:
        super().__init__(name="producer", daemon=True)
        self.ledger = ledger
        self._sender = sender
        self._client: Client = redis.Redis.from_url(
            url, socket_timeout=_ANSWER_WITHIN_S, protocol=2, retry=None, retry_on_error=[]
        )
        self._rest = iter(jobs)
        self._bursts: queue.Queue[int] = queue.Queue()

    def burst(self, jobs: int) -> None:
        """Send the next `jobs` jobs, as fast as the server accepts them."""
        self._bursts.put(jobs)

    def run(self) -> None:
        """Send bursts until `finish`."""
        while count := self._bursts.get():
            burst = list(self._next(count))
            for first in range(0, len(burst), _AT_ONCE):
                self._send(burst[first : first + _AT_ONCE])
            if self._sender:
                self._sender.cancel(burst)

    def finish(self, within_s: float) -> None:
        """Wait until all bursts are sent. Raises TimeoutError."""
        self._bursts.put(0)
        self.join(within_s)
        if self.is_alive():
            raise TimeoutError("the producer could not send its jobs")
        self._client.close()
        if self._sender:
            self._sender.close()

    def _next(self, count: int) -> Iterator[Planned]:
        for _ in range(count):
            planned = next(self._rest, None)
            if planned is None:
                return
            yield planned

    def _send(self, batch: list[Planned]) -> None:
        """Send until each job is confirmed, or the connection breaks before the answer."""
        self.ledger.planned |= {planned.id: planned for planned in batch}
        self.ledger.mono_sent_s |= dict.fromkeys((planned.id for planned in batch), time.monotonic())
        members = [planned for planned in batch if planned.flow.batch]
        if self._sender and members:
            self._sender.send(members)
            batch = [planned for planned in batch if not planned.flow.batch]
        while batch:
            batch = self._try(batch)
            if batch:
                time.sleep(
                    _REFUSED_PAUSE_S
                )  # a server that refuses writes does not say when it accepts them again

    def _try(self, batch: list[Planned]) -> list[Planned]:
        """Send once; returns the jobs that the server refused, and so does not have."""
        pipe = self._client.pipeline(transaction=False)
        for planned in batch:
            pipe.xadd(STREAM, self._sender.stamp(planned) if self._sender else planned.fields)
        try:
            replies = pipe.execute(raise_on_error=False)
        except redis.RedisError:
            self.ledger.unanswered.update(planned.id for planned in batch)
            return []
        refused = []
        for planned, reply in zip(batch, replies, strict=True):
            if isinstance(reply, Exception):
                refused.append(planned)
            else:
                self.ledger.confirmed[planned.id] = reply.decode()
        self.ledger.refusals += len(refused)
        return refused
