"""The oracle is not blind: each broken promise, made up here, is reported as that one and as no other."""

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
    """A server of which only the dead letters are asked."""

    def __init__(self, *letters: dict[str, Any]) -> None:
        self._letters = letters

    def xrange(self, stream: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        letters = self._letters if stream == "dlq:chaos:jobs" else ()
        return [(b"1-1", {b"data": json.dumps(letter).encode()}) for letter in letters]


class World:
    """A kept promise that tests break: one job that succeeded, one poison job, one that is no job."""

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
        """Names of the promises that the verdict says were broken."""
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


def test_kept_promises_are_called_safe(world: World) -> None:
    verdict = world.judge()
    assert verdict.safe
    assert (verdict.executions, verdict.repeated, verdict.dead_letters) == (1, 0, 2)
    assert verdict.poison_starts == {3: 1}


def test_a_second_execution_is_counted_and_no_fault(world: World) -> None:
    world.lines += [f"start {GOOD} 0 9 3.0", f"end {GOOD} 0 9 3.1"]
    verdict = world.judge()
    assert verdict.safe
    assert verdict.repeated == 1


def test_a_confirmed_job_without_effect_is_lost(world: World) -> None:
    world.effects.clear()
    assert world.broken() == {"lost"}


def test_a_job_of_which_nobody_knows_whether_it_was_sent_may_be_missing(world: World) -> None:
    world.effects.clear()
    world.ledger.unanswered.add(GOOD)
    del world.ledger.confirmed[GOOD]
    assert world.broken() == set()


def test_two_effects_of_one_job_are_a_duplicate(world: World) -> None:
    world.effects["t.other"] = GOOD
    assert world.broken() == {"effect_duplicates"}


def test_an_effect_of_a_job_that_must_fail_is_one_too_many(world: World) -> None:
    world.effects["t.poison"] = POISON
    assert world.broken() == {"effect_duplicates"}


def test_a_job_that_nobody_sent_is_unexpected(world: World) -> None:
    world.lines.append("start job-999999 0 7 1.0")
    assert world.broken() == {"unexpected"}


@pytest.mark.parametrize("letter", [0, 1])
def test_a_dead_letter_may_not_be_missing(world: World, letter: int) -> None:
    del world.letters[letter]
    assert world.broken() == {"letters_missing"}


def test_a_dead_letter_may_not_come_twice(world: World) -> None:
    world.letters.append(world.poison)
    assert world.broken() == {"letters_repeated"}


def test_a_dead_letter_gives_the_right_reason(world: World) -> None:
    world.poison["reason"] = "exhausted"
    assert world.broken() == {"letters_wrong_reason"}


def test_a_job_that_succeeds_has_no_dead_letter(world: World) -> None:
    world.letters.append({"task": {"id": GOOD}, "reason": "exhausted", "original_id": "1-1"})
    assert world.broken() == {"letters_unexpected"}


def test_a_job_under_which_three_workers_were_killed_is_given_up_as_promised(world: World) -> None:
    world.effects.clear()
    world.lines = [f"start {GOOD} 0 {pid} 1.0" for pid in (4, 5, 6)] + world.lines[2:]
    world.letters.append({"task": {"id": GOOD}, "reason": "poison", "original_id": "1-1"})
    assert world.broken() == {"cut_off"}


def test_a_poison_job_may_not_be_started_more_often_than_it_may_kill(world: World) -> None:
    world.lines.append(f"start {POISON} 0 11 3.0")
    assert world.broken() == {"poison_starts_over"}


def test_a_retry_may_not_come_before_its_time(world: World) -> None:
    world.lines[:0] = [f"start {GOOD} 0 7 0.80", f"fail {GOOD} 0 7 0.85"]
    world.lines[2:4] = [f"start {GOOD} 1 7 0.90", f"end {GOOD} 1 7 0.95"]
    assert world.broken() == {"retries_early"}
