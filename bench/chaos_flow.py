"""Flow control in the chaos test: jobs with keys, delays, results and batches, and what is done to them.

The jobs of `chaos_load.plan` get these marks; most of them stay as they are. Cron tables and the callbacks of
batches add jobs of their own.
"""

import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import orjson
from chaos_events import effect_key
from chaos_load import MANY, ONE, PROBE, STREAM, Fields, Flow, Ledger, Planned

from jobworker.worker.cancel import Canceller, JobFilter
from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reaper import RedisReaperStore

#: Jobs of one block: the blocks of some are batches.
_BLOCK, _BATCH_SHARE = 40, 0.3
#: Share of each mark among the jobs that succeed.
_SHARES = {"key": 0.06, "series": 0.06, "delay": 0.06, "cancel": 0.04, "keep": 0.06}
#: Jobs with one idempotency key, and most jobs of one series.
_WITH_KEY, _IN_SERIES = 2, 4
#: Longest delay (s).
_LONGEST_S = 1.5
#: Pause before a refused call is repeated (s).
_REFUSED_PAUSE_S = 0.1
#: Ids of jobs that the service enqueues.
CALLBACK, TICK = "batch:", "cron:"
#: Cron tables; their jobs are those of a type without a limit.
CRON_NAMES = ("each-second", "each-three")
CRON = "".join(
    f"""
[[cron]]
name = "{name}"
schedule = "@every {seconds}s"
type = "{PROBE}"
stream = "{STREAM}"
tenant_id = "cron"
missed = "skip"
payload = {{ fate = "ok", text = "tick" }}
"""
    for name, seconds in zip(CRON_NAMES, (1, 3), strict=True)
)
#: Stands for the start time of a delayed job until it is sent.
_DUE = "@due@"


def with_flow(jobs: Sequence[Planned], rng: random.Random) -> list[Planned]:
    """The jobs, some of them marked."""
    batches = {block for block in range(len(jobs) // _BLOCK + 1) if rng.random() < _BATCH_SHARE}
    groups: dict[str, tuple[str, str, int]] = {}
    marked = []
    for number, job in enumerate(jobs):
        block = number // _BLOCK
        flow, tenant = _mark(job, number, groups, rng)
        # Jobs of batches are sent in another way, so the order of a series would not be known.
        batch = f"b{block:04d}" if block in batches and job.kind and not flow.series else ""
        marked.append(_marked(job, flow._replace(batch=batch), tenant) if batch or flow != Flow() else job)
    return marked


def _mark(
    job: Planned, number: int, groups: dict[str, tuple[str, str, int]], rng: random.Random
) -> tuple[Flow, str]:
    """Marks of a job, and its tenant: jobs of one group have one. Jobs that do not succeed get none."""
    if job.kind not in (ONE, MANY) or job.fate != "ok":
        return Flow(), job.tenant
    name = rng.choices([*_SHARES, ""], [*_SHARES.values(), 1 - sum(_SHARES.values())])[0]
    if not name:
        return Flow(), job.tenant
    if name == "delay":
        return Flow(delay_s=rng.uniform(0.1, _LONGEST_S)), job.tenant
    if name in ("cancel", "keep"):
        return Flow(cancel=name == "cancel", keep=name == "keep"), job.tenant
    # Groups are of one type and tenant.
    of_kind = f"{name}/{job.kind}"
    group, tenant, left = groups.get(of_kind, ("", "", 0))
    if not left:
        group, tenant = f"{name}-{number}", job.tenant
        left = _WITH_KEY if name == "key" else rng.randint(2, _IN_SERIES)
    groups[of_kind] = (group, tenant, left - 1)
    delay_s = rng.choice([0.0, rng.uniform(0.1, _LONGEST_S)]) if name == "series" else 0.0
    flow = Flow(key=group) if name == "key" else Flow(series=group, delay_s=delay_s)
    return flow, tenant


def _marked(job: Planned, flow: Flow, tenant: str) -> Planned:
    wire = orjson.loads(job.fields[b"data"])
    wire["tenant_id"] = tenant
    metadata = {
        "idempotency_key": flow.key, "supersede_key": flow.series, "batch_id": flow.batch,
        "keep_result": "true" if flow.keep else "", "not_before": _DUE if flow.delay_s else "",
    }  # fmt: skip
    wire["metadata"] |= {name: text for name, text in metadata.items() if text}
    effect = job.effect and effect_key(tenant, job.id, wire["payload"]["text"])
    return job._replace(effect=effect, fields={b"data": orjson.dumps(wire)}, tenant=tenant, flow=flow)


class FlowSender:
    """Sends batches and cancels jobs, directly to the server; it repeats what the server refuses."""

    def __init__(self, url: str, ledger: Ledger, jobs: Sequence[Planned]) -> None:
        self._ledger = ledger
        self._store = RedisProducerStore(url)
        for job in jobs:
            if job.flow.batch:
                ledger.batches[job.flow.batch] = ledger.batches.get(job.flow.batch, 0) + 1
        self._left = dict(ledger.batches)

    def stamp(self, job: Planned) -> Fields:
        """The fields of a job as they are sent now, with the start time of a delayed one."""
        if not job.flow.delay_s:
            return job.fields
        due_s = time.time() + job.flow.delay_s
        self._ledger.wall_due_s[job.id] = due_s
        text = datetime.fromtimestamp(due_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {b"data": job.fields[b"data"].replace(_DUE.encode(), text.encode(), 1)}

    def send(self, jobs: Sequence[Planned]) -> None:
        """Enqueue jobs of batches. One step adds them with their count, so a lost answer is made up for."""
        for batch in dict.fromkeys(job.flow.batch for job in jobs):
            members = [job for job in jobs if job.flow.batch == batch]
            self._until_answered(partial(self._open, batch))
            before = self._total(batch)
            while self._total(batch) == before:
                datas = [self.stamp(job)[b"data"] for job in members]
                try:
                    self._store.batch_add(STREAM, batch, "", datas)
                except StoreUnavailable:
                    time.sleep(_REFUSED_PAUSE_S)  # no event says when it accepts jobs again
            self._ledger.confirmed |= {job.id: "" for job in members}
            self._left[batch] -= len(members)
            if not self._left[batch]:
                self._until_answered(partial(self._store.batch_close, STREAM, batch))

    def _open(self, batch: str) -> None:
        done = {"id": "", "type": PROBE, "tenant_id": "batch", "payload": {"fate": "ok", "text": batch}}
        self._store.batch_open(STREAM, batch, {"on_complete": orjson.dumps(done)})

    def _total(self, batch: str) -> int:
        found: list[Any] = []
        self._until_answered(lambda: found.append(self._store.batch_hash(STREAM, batch)))
        return found[-1].total if found[-1] else 0

    def _until_answered(self, call: Callable[[], object]) -> None:
        while True:
            try:
                call()
                return
            except StoreUnavailable:
                time.sleep(_REFUSED_PAUSE_S)  # no event says when it answers again

    def cancel(self, jobs: Sequence[Planned]) -> None:
        """Cancel the jobs that are to be cancelled, and record what the store said of each."""
        ids = [job.id for job in jobs if job.flow.cancel]
        if not ids:
            return
        # Until the answer is known, it may have been carried out.
        self._ledger.cancels |= dict.fromkeys(ids, "unanswered")
        search = Canceller(self._store, [STREAM], JobFilter(frozenset(ids)), by="chaos")
        try:
            for one in search.run():
                if self._ledger.cancels[one.id] not in ("cancelled", "requested"):
                    self._ledger.cancels[one.id] = str(one.outcome)
                    self._ledger.mono_cancelled_s[one.id] = time.monotonic()
        except StoreUnavailable:
            return

    def close(self) -> None:
        """Drop the connections."""
        self._store.close()


def stop_cron(url: str, within_s: float) -> dict[str, tuple[int, int]]:
    """Pause the tables. Returns by name the last tick that was surely enqueued, and the last that may be."""
    give_up_at = time.monotonic() + within_s
    while True:
        store = RedisReaperStore(url)
        try:
            before = store.cron_hash(STREAM).cursors_s
            for name in CRON_NAMES:
                store.cron_pause(STREAM, name, "the test ends")
            after = store.cron_hash(STREAM).cursors_s
            return {name: (before[name], after[name]) for name in CRON_NAMES}
        except StoreUnavailable:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(_REFUSED_PAUSE_S)  # no event says when it answers again
        finally:
            store.close()


def cron_cursors(url: str) -> dict[str, int]:
    """The last tick of each table (unix seconds)."""
    store = RedisReaperStore(url)
    try:
        return store.cron_hash(STREAM).cursors_s
    finally:
        store.close()
