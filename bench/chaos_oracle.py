"""Oracle of the chaos test: compares confirmed jobs with recorded events, effects and dead letters."""

import base64
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from chaos_events import END, FAIL, START, Event, EventLog
from chaos_load import PROBE, PROBE_STREAM, STREAM, Ledger, Planned

#: Accepted reasons of a dead letter by fate. A job that always fails and is interrupted by kills may have
#: several.
_REASONS = {
    "poison": {"poison"},
    "permanent": {"permanent"},
    "exhausted": {"exhausted", "poison", "timeout"},
    "malformed": {"malformed"},
    "unknown_type": {"unknown_type"},
}
#: Ids of jobs that the service enqueues itself: callbacks of batches and ticks of cron.
_OF_SERVICE = ("batch:", "cron:")
#: Deaths after which a job is dead-lettered, for any cause.
_MAX_DEATHS = 3
#: Lower bound of the backoff: initial 0.1 s, factor 2, jitter of 10 %, and a margin for clock rounding.
_RETRY_INITIAL_S, _RETRY_MAX_S, _EARLIEST = 0.1, 2.0, 0.9
_ROUNDING_S = 0.005


class Letter(NamedTuple):
    """Dead letter; `id` is that of its job, empty if it holds none of the test."""

    id: str
    reason: str
    deaths: int


@dataclass
class Verdict:
    """Ids of jobs by broken promise. ``repeated`` and ``cut_off`` are counted, but break none."""

    confirmed: int = 0
    unanswered: int = 0
    lost: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    effect_duplicates: list[str] = field(default_factory=list)
    letters_missing: list[str] = field(default_factory=list)
    letters_unexpected: list[str] = field(default_factory=list)
    letters_repeated: list[str] = field(default_factory=list)
    letters_wrong_reason: list[str] = field(default_factory=list)
    poison_starts: dict[int, int] = field(default_factory=dict)
    poison_starts_over: list[str] = field(default_factory=list)
    retries_early: list[str] = field(default_factory=list)
    over_limit: list[str] = field(default_factory=list)
    over_rate: list[str] = field(default_factory=list)
    key_doubled: list[str] = field(default_factory=list)
    key_lost: list[str] = field(default_factory=list)
    series_lost: list[str] = field(default_factory=list)
    series_disorder: list[str] = field(default_factory=list)
    started_early: list[str] = field(default_factory=list)
    cancel_wrong: list[str] = field(default_factory=list)
    results_wrong: list[str] = field(default_factory=list)
    batch_wrong: list[str] = field(default_factory=list)
    cron_wrong: list[str] = field(default_factory=list)
    flow_counts: dict[str, int] = field(default_factory=dict)
    most_at_once: int = 0
    dead_ids: set[str] = field(default_factory=set)
    repeated: int = 0
    repeated_jobs: int = 0
    cut_off: list[str] = field(default_factory=list)
    executions: int = 0
    dead_letters: int = 0

    def count_flow(self, what: str, number: int = 1) -> None:
        """Count what flow control was seen to do: an oracle that saw nothing says nothing."""
        self.flow_counts[what] = self.flow_counts.get(what, 0) + number

    def broken(self, excused: Collection[str] = ()) -> list[str]:
        """Names of the broken promises, without the excused ones."""
        named = [name for name, value in vars(self).items() if isinstance(value, list) and value]
        return [name for name in named if name != "cut_off" and name not in excused]

    @property
    def safe(self) -> bool:
        """Whether every promise about jobs was kept."""
        return not self.broken()


def judge(ledger: Ledger, event_log: EventLog, client: Any, uncounted_deaths: int) -> Verdict:
    """Judge the idle system."""
    verdict = Verdict(len(ledger.confirmed), len(ledger.unanswered))
    events = event_log.read()
    letters = letters_of(client, ledger)
    _count_executions(verdict, events)
    _check_effects(verdict, ledger, event_log.effects())
    _check_letters(verdict, ledger, letters, _cut_off(events))
    _check_poison(verdict, ledger, events, uncounted_deaths)
    _check_backoff(verdict, events)
    expected_ids = ledger.planned.keys()
    unknown = {event.id for event in events} - expected_ids
    verdict.unexpected += sorted(id for id in unknown if not id.startswith(_OF_SERVICE))
    return verdict


def letters_of(client: Any, ledger: Ledger) -> list[Letter]:
    """All dead letters.

    That of a job without a field ``data`` names no job: it is found by its entry, or is that of such a job
    whose XADD was not answered.
    """
    found = []
    unanswered = [
        id for id in sorted(ledger.unanswered)
        if ledger.planned[id].fate == "malformed" and b"data" not in ledger.planned[id].fields
    ]  # fmt: skip
    for stream in (STREAM, PROBE_STREAM):
        by_entry = {
            entry: id for id, entry in ledger.confirmed.items()
            if entry and (ledger.planned[id].kind == PROBE) == (stream == PROBE_STREAM)
        }  # fmt: skip
        for _, fields in client.xrange(f"dlq:{stream}"):
            letter = _letter(orjson.loads(fields[b"data"]), by_entry, ledger.planned)
            if not letter.id and letter.reason == "malformed" and unanswered:
                letter = letter._replace(id=unanswered.pop())
            found.append(letter)
    return found


def _letter(letter: dict[str, Any], by_entry: dict[str, str], planned: dict[str, Planned]) -> Letter:
    id = (letter["task"] or {}).get("id", "")
    if not id:
        raw = base64.b64decode(letter.get("raw") or "")
        id = _named_in(raw, planned) or by_entry.get(letter["original_id"], "")
    return Letter(id, letter["reason"], letter.get("deaths") or 0)


def _named_in(raw: bytes, planned: dict[str, Planned]) -> str:
    at = raw.find(b"job-")
    id = raw[at : at + len("job-000000")].decode("latin-1") if at >= 0 else ""
    return id if id in planned else ""


def _count_executions(verdict: Verdict, events: Iterable[Event]) -> None:
    ends = Counter(event.id for event in events if event.what == END)
    verdict.executions = sum(ends.values())
    verdict.repeated = sum(count - 1 for count in ends.values())
    verdict.repeated_jobs = sum(count > 1 for count in ends.values())


def _check_effects(verdict: Verdict, ledger: Ledger, effects: dict[str, list[str]]) -> None:
    for id, planned in ledger.planned.items():
        keys = effects.get(id, [])
        if id in ledger.confirmed and planned.must_run and planned.effect not in keys:
            verdict.lost.append(id)
        if len(keys) > 1 or (keys and keys != [planned.effect]):
            verdict.effect_duplicates.append(id)
    unknown = effects.keys() - ledger.planned.keys()
    verdict.unexpected += sorted(id for id in unknown if not id.startswith(_OF_SERVICE))


def _cut_off(events: Iterable[Event]) -> Counter[str]:
    """How many tries of each job have no end: their worker died or was killed."""
    open_tries: Counter[str] = Counter()
    for event in events:
        open_tries[event.id] += 1 if event.what == START else -1
    return open_tries


def _check_letters(
    verdict: Verdict, ledger: Ledger, letters: Sequence[Letter], cut_off: Counter[str]
) -> None:
    verdict.dead_letters = len(letters)
    verdict.dead_ids = {letter.id for letter in letters}
    counts = Counter(letter.id for letter in letters)
    verdict.letters_repeated = sorted(id for id, count in counts.items() if count > 1)
    for letter in letters:
        planned = ledger.planned.get(letter.id)
        reasons = _REASONS.get(planned.fate, set()) if planned else set()
        if letter.reason in reasons or (letter.reason == "cancelled" and letter.id in ledger.cancels):
            continue
        if letter.reason == "poison" and cut_off[letter.id] >= _MAX_DEATHS:
            verdict.cut_off.append(letter.id)  # the test killed it three times: dead-lettered as promised
        elif reasons:
            verdict.letters_wrong_reason.append(f"{letter.id}: {letter.reason}")
        else:
            verdict.letters_unexpected.append(f"{letter.id}: {letter.reason}")
    expected = {id for id in ledger.confirmed if not ledger.planned[id].effect}
    verdict.letters_missing = sorted(expected - counts.keys())
    verdict.lost = sorted(set(verdict.lost) - set(verdict.cut_off))


def _check_poison(verdict: Verdict, ledger: Ledger, events: Iterable[Event], uncounted_deaths: int) -> None:
    starts = Counter(
        event.id for event in events
        if event.what == START and event.id in ledger.planned and ledger.planned[event.id].fate == "poison"
    )  # fmt: skip
    verdict.poison_starts = dict(sorted(Counter(starts.values()).items()))
    max_starts = _MAX_DEATHS + uncounted_deaths
    verdict.poison_starts_over = sorted(id for id, count in starts.items() if count > max_starts)


def _check_backoff(verdict: Verdict, events: Iterable[Event]) -> None:
    """No retry starts before its backoff is over."""
    failed: dict[str, Event] = {}
    for event in events:
        before = failed.get(event.id)
        if event.what == FAIL:
            failed[event.id] = event
        elif event.what == START and before and event.retry_count > before.retry_count:
            min_s = min(_RETRY_MAX_S, _RETRY_INITIAL_S * 2.0**event.retry_count) * _EARLIEST - _ROUNDING_S
            if event.mono_s - before.mono_s < min_s:
                verdict.retries_early.append(f"{event.id}: {event.mono_s - before.mono_s:.3f} s")
