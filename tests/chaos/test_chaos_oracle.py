"""Oracle of the chaos test: each fabricated broken promise is reported, and no other one."""

import base64
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
GOOD, POISON, MALFORMED = "job-000001", "job-000002", "job-000003"


class Letters:
    """A server with dead letters only."""

    def __init__(self, *letters: dict[str, Any]) -> None:
        self._letters = letters

    def xrange(self, stream: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        letters = self._letters if stream == "dlq:chaos:jobs" else ()
        return [(b"1-1", {b"data": json.dumps(letter).encode()}) for letter in letters]


class World:
    """A run without fault, which tests change: a successful job, a poison job, a malformed one."""

    def __init__(self, folder: Path) -> None:
        self.load, self.events_module, self.oracle = map(
            importlib.import_module, ("chaos_load", "chaos_events", "chaos_oracle")
        )
        self._folder = folder
        self.event_log = self.events_module.EventLog(folder)
        self.ledger = self.load.Ledger()
        for id, fate, effect in (
            (GOOD, "ok", "t.good"),
            (POISON, "poison", ""),
            (MALFORMED, "malformed", ""),
        ):
            self.ledger.planned[id] = self.load.Planned(id, fate, effect, {})
            self.ledger.confirmed[id] = f"1-{id[-1]}"
        self.poison = {"task": {"id": POISON}, "reason": "poison", "original_id": "1-2", "deaths": 3}
        raw = base64.b64encode(b'["%s"]' % MALFORMED.encode()).decode()
        self.malformed = {"task": None, "raw": raw, "reason": "malformed", "original_id": "1-3"}
        self.letters = [self.poison, self.malformed]
        self.lines = [f"start {GOOD} 0 7 1.0", f"end {GOOD} 0 7 1.1"]
        self.lines += [f"start {POISON} 0 {pid} 2.0" for pid in (8, 9, 10)]
        self.effects = {"t.good": GOOD}

    def judge(self) -> Any:
        """The verdict."""
        (self._folder / "events").write_text("".join(line + "\n" for line in self.lines))
        for key, id in self.effects.items():
            (self._folder / "effects" / key).symlink_to(id)
        return self.oracle.judge(self.ledger, self.event_log, Letters(*self.letters), uncounted_deaths=0)

    def broken(self) -> set[str]:
        """Names of the broken promises in the verdict."""
        verdict = self.judge()
        found = {name for name, value in vars(verdict).items() if isinstance(value, list) and value}
        assert verdict.safe == (not found - {"cut_off"})
        return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    one = World(tmp_path)
    yield one
    one.event_log.close()
    for name in set(sys.modules) - before:
        if name.startswith("chaos"):
            del sys.modules[name]


def test_a_run_without_fault_is_safe(world: World) -> None:
    verdict = world.judge()
    assert verdict.safe
    assert (verdict.executions, verdict.repeated, verdict.dead_letters) == (1, 0, 2)
    assert verdict.poison_starts == {3: 1}


def test_a_second_execution_is_counted_but_breaks_no_promise(world: World) -> None:
    world.lines += [f"start {GOOD} 0 9 3.0", f"end {GOOD} 0 9 3.1"]
    verdict = world.judge()
    assert verdict.safe
    assert verdict.repeated == 1


def test_a_confirmed_job_without_effect_is_lost(world: World) -> None:
    world.effects.clear()
    assert world.broken() == {"lost"}


def test_an_unconfirmed_job_may_be_missing(world: World) -> None:
    world.effects.clear()
    world.ledger.unanswered.add(GOOD)
    del world.ledger.confirmed[GOOD]
    assert world.broken() == set()


def test_two_effects_of_one_job_are_a_duplicate(world: World) -> None:
    world.effects["t.other"] = GOOD
    assert world.broken() == {"effect_duplicates"}


def test_an_effect_of_a_job_that_must_fail_is_reported(world: World) -> None:
    world.effects["t.poison"] = POISON
    assert world.broken() == {"effect_duplicates"}


def test_a_job_that_was_not_sent_is_unexpected(world: World) -> None:
    world.lines.append("start job-999999 0 7 1.0")
    assert world.broken() == {"unexpected"}


@pytest.mark.parametrize("letter", [0, 1])
def test_a_missing_dead_letter_is_reported(world: World, letter: int) -> None:
    del world.letters[letter]
    assert world.broken() == {"letters_missing"}


def test_a_repeated_dead_letter_is_reported(world: World) -> None:
    world.letters.append(world.poison)
    assert world.broken() == {"letters_repeated"}


def test_a_wrong_reason_of_a_dead_letter_is_reported(world: World) -> None:
    world.poison["reason"] = "exhausted"
    assert world.broken() == {"letters_wrong_reason"}


def test_a_dead_letter_of_a_successful_job_is_reported(world: World) -> None:
    world.letters.append({"task": {"id": GOOD}, "reason": "exhausted", "original_id": "1-1"})
    assert world.broken() == {"letters_unexpected"}


def test_a_job_whose_worker_was_killed_three_times_may_be_dead_lettered(world: World) -> None:
    world.effects.clear()
    world.lines = [f"start {GOOD} 0 {pid} 1.0" for pid in (4, 5, 6)] + world.lines[2:]
    world.letters.append({"task": {"id": GOOD}, "reason": "poison", "original_id": "1-1"})
    assert world.broken() == {"cut_off"}


def test_too_many_starts_of_a_poison_job_are_reported(world: World) -> None:
    world.lines.append(f"start {POISON} 0 11 3.0")
    assert world.broken() == {"poison_starts_over"}


def test_a_retry_before_its_backoff_is_reported(world: World) -> None:
    world.lines[:0] = [f"start {GOOD} 0 7 0.80", f"fail {GOOD} 0 7 0.85"]
    world.lines[2:4] = [f"start {GOOD} 1 7 0.90", f"end {GOOD} 1 7 0.95"]
    assert world.broken() == {"retries_early"}
