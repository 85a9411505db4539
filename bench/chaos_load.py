"""The load: a seeded mix of jobs with a fate each, and a producer that notes what the server confirmed."""

import json
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import redis
from chaos_events import effect_key

STREAM, PROBE_STREAM, GROUP = "chaos:jobs", "chaos:probes", "chaos"
ONE, MANY = "chaos_one", "chaos_many"
#: Share of each fate; the rest succeeds. Flaky ones fail once, exhausted ones at every try.
SHARES = {"flaky": 0.045, "exhausted": 0.005, "permanent": 0.01, "malformed": 0.01, "poison": 0.005}
#: Share of the jobs whose handler takes several at once.
_MANY_SHARE = 0.25
_TENANTS = 20
#: Commands of one send: a producer that is answered one by one never builds a backlog.
_AT_ONCE = 16
#: Pause before what the server has refused is sent again.
_REFUSED_PAUSE_S = 0.1
#: A server that is down answers or refuses a producer within this.
_ANSWER_WITHIN_S = 5.0

Fields = dict[bytes, bytes]
Client = Any


class Planned(NamedTuple):
    """A job to be sent. ``effect`` is the key that its success leaves; empty where it must not succeed."""

    id: str
    fate: str
    effect: str
    fields: Fields


def plan(jobs: int, rng: random.Random) -> list[Planned]:
    """The jobs in the order they are sent."""
    fates = [fate for fate, share in SHARES.items() for _ in range(max(1, round(jobs * share)))][:jobs]
    fates += ["ok"] * (jobs - len(fates))
    rng.shuffle(fates)
    return [_planned(f"job-{number:06d}", fate, number, rng) for number, fate in enumerate(fates)]


def probe(number: int) -> Planned:
    """A job that is only there to be started soon."""
    return _job(f"probe-{number:06d}", "ok", ONE, "t00", "probe")


def _planned(id: str, fate: str, number: int, rng: random.Random) -> Planned:
    if fate == "malformed":
        return Planned(id, *_MALFORMED[number % len(_MALFORMED)](id))
    kind = MANY if rng.random() < _MANY_SHARE else ONE
    tenant = "t00" if rng.random() < 0.5 else f"t{rng.randrange(1, _TENANTS):02d}"
    return _job(id, fate, kind, tenant, f"chapter {rng.randrange(10**9)}: 風雪夜歸人")


def _job(id: str, fate: str, kind: str, tenant: str, text: str) -> Planned:
    wire = {"id": id, "type": kind, "tenant_id": tenant, "project_id": "p1",
            "payload": {"fate": fate, "text": text}, "metadata": {"request_id": id},
            "created_at": "2026-01-02T10:00:00.123Z"}  # fmt: skip
    succeeds = fate in ("ok", "flaky")
    return Planned(
        id, fate, effect_key(tenant, id, text) if succeeds else "",
        {b"data": json.dumps(wire, ensure_ascii=False).encode()},
    )  # fmt: skip


def _bad(text: str) -> Any:
    """A maker of a malformed job; ``@`` stands for its id, by which its dead letter is recognised."""
    return lambda id: ("malformed", "", {b"data": text.replace("@", id).encode("latin-1")})


#: One of each sort in turn.
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
    lambda id: ("unknown_type", "", {b"data": json.dumps({"id": id, "type": "unknown"}).encode()}),
)


@dataclass
class Ledger:
    """What was sent. ``confirmed`` maps ids to entry ids; of ``unanswered`` it is unknown."""

    planned: dict[str, Planned] = field(default_factory=dict)
    confirmed: dict[str, str] = field(default_factory=dict)
    unanswered: set[str] = field(default_factory=set)
    refusals: int = 0


class Producer(threading.Thread):
    """Sends bursts when told to, straight to the server, and continues after any trouble."""

    def __init__(self, url: str, jobs: Sequence[Planned]) -> None:
        super().__init__(name="producer", daemon=True)
        self.ledger = Ledger()
        self._client: Client = redis.Redis.from_url(
            url, socket_timeout=_ANSWER_WITHIN_S, protocol=2, retry=None, retry_on_error=[]
        )
        self._rest = iter(jobs)
        self._orders: queue.Queue[int] = queue.Queue()

    def burst(self, jobs: int) -> None:
        """Send `count` more, as fast as the server takes them."""
        self._orders.put(jobs)

    def run(self) -> None:
        """Until `finish`."""
        while count := self._orders.get():
            batch: list[Planned] = []
            for planned in self._next(count):
                batch.append(planned)
                if len(batch) == _AT_ONCE:
                    self._send(batch)
                    batch = []
            self._send(batch)

    def finish(self, within_s: float) -> None:
        """Wait until all that was ordered is sent. Raises TimeoutError."""
        self._orders.put(0)
        self.join(within_s)
        if self.is_alive():
            raise TimeoutError("the producer could not send its jobs")
        self._client.close()

    def _next(self, count: int) -> Iterator[Planned]:
        for _ in range(count):
            planned = next(self._rest, None)
            if planned is None:
                return
            yield planned

    def _send(self, batch: list[Planned]) -> None:
        """Send until each is confirmed, or the connection broke before it was known."""
        while batch:
            batch = self._try(batch)
            if batch:
                time.sleep(
                    _REFUSED_PAUSE_S
                )  # a server that refuses writes does not say when it accepts them again

    def _try(self, batch: list[Planned]) -> list[Planned]:
        """Send once; returns those that the server has refused, and so surely does not have."""
        self.ledger.planned |= {planned.id: planned for planned in batch}
        pipe = self._client.pipeline(transaction=False)
        for planned in batch:
            pipe.xadd(STREAM, planned.fields)
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
