"""Write fence: admission, leases, minimum versions, and how a rebuild learns of other writes."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from jobworker.handlers.jobstore.fence import RebuildLease, WriteIntent
from jobworker.handlers.jobstore.open import open_rebuilds
from jobworker.worker import ConfigurationError, Fenced

NAME = "story_segments"
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}


def intent(
    token: str, *ids: str, owner: str = "", held: Sequence[str] = (), chapters: Any = ()
) -> WriteIntent:
    return WriteIntent("z_a", token, owner or token, ids, tuple(held), tuple(chapters))


def verdicts(fence: Any, *intents: WriteIntent) -> list[str]:
    return [answer.verdict for answer in fence.admit(intents)]


def test_a_rebuild_without_a_job_store_is_refused() -> None:
    """It would not see the writes that another object in memory admits."""
    with pytest.raises(ConfigurationError, match="empty"):
        open_rebuilds("")


def test_ids_that_one_writer_holds_are_refused_to_others_as_a_whole(fence: Any) -> None:
    first, second = intent("a", held=["x", "y"]), intent("b", held=["y", "z"])
    third = intent("c", held=["z"])
    assert verdicts(fence, first, second, third) == ["in", "held", "in"]
    fence.release([first])
    assert verdicts(fence, second) == ["held"]
    fence.release([third])
    assert verdicts(fence, second) == ["in"]


def test_the_next_attempt_of_a_job_gets_the_ids_of_the_one_before(fence: Any) -> None:
    died, again = intent("a", owner="job", held=["x"]), intent("b", owner="job", held=["x"])
    assert verdicts(fence, died, again, intent("c", held=["x"])) == ["in", "in", "held"]
    fence.release([again])
    assert verdicts(fence, intent("c", held=["x"])) == ["in"]


def test_writes_without_a_version_do_not_wait_for_each_other(fence: Any) -> None:
    assert verdicts(fence, intent("a", "1"), intent("b", "1")) == ["in", "in"]


def test_collections_do_not_wait_for_each_other(fence: Any) -> None:
    first = intent("a", held=["x"])
    assert verdicts(fence, first, first._replace(token="b", owner="b", collection="z_b")) == ["in", "in"]


def test_minimum_versions_of_64_bits_are_returned_and_missing_ones_left_out(fence: Any) -> None:
    write = intent("a", chapters=["c1", "c2", "c3"])
    fence.record_removal(write, [], {"c2": 2**63 - 1, "c3": -(2**63)})
    (answer,) = fence.admit([write])
    assert answer.min_versions == {"c2": 2**63 - 1, "c3": -(2**63)}


def test_one_process_rebuilds_at_a_time_and_an_earlier_one_is_fenced_off(fence: Any) -> None:
    first = fence.begin("z_a", "one", 60_000)
    assert fence.begin("z_a", "two", 60_000) == "one"
    fence.save("z_a", first.epoch, {"phase": "fill"}, lease_ms=60_000)
    again = fence.begin("z_a", "one", 60_000)
    assert isinstance(again, RebuildLease)
    assert again.fields["phase"] == "fill"
    with pytest.raises(Fenced):
        fence.save("z_a", first.epoch, {"phase": "old"}, lease_ms=60_000)
    fence.save("z_a", again.epoch, {}, lease_ms=0)
    assert isinstance(fence.begin("z_a", "two", 60_000), RebuildLease)
    assert fence.state("z_a")["phase"] == "fill"


def test_closed_admission_lets_admitted_writers_finish_and_opens_again(fence: Any) -> None:
    inside, outside = intent("a", "1"), intent("b", "2")
    epoch = fence.begin("z_a", "one", 60_000).epoch
    assert verdicts(fence, inside) == ["in"]
    fence.save("z_a", epoch, {}, lease_ms=60_000, shut_ms=60_000)
    assert verdicts(fence, inside, outside) == ["in", "closed"]
    assert fence.writers("z_a") == 1
    fence.release([inside])
    assert fence.writers("z_a") == 0
    fence.save("z_a", epoch, {}, lease_ms=60_000, shut_ms=0)
    assert verdicts(fence, outside) == ["in"]


def test_closed_admission_opens_after_its_time(fence: Any) -> None:
    epoch = fence.begin("z_a", "one", 60_000).epoch
    fence.save("z_a", epoch, {}, lease_ms=60_000, shut_ms=50)
    assert verdicts(fence, intent("a")) == ["closed"]
    time.sleep(0.06)  # it is the passing of time that opens it
    assert verdicts(fence, intent("a")) == ["in"]


def test_ids_written_during_a_rebuild_are_returned_until_they_are_processed(fence: Any) -> None:
    early, late = intent("a", "1", "2"), intent("b", "3")
    fence.admit([early])
    epoch = fence.begin("z_a", "one", 60_000).epoch
    fence.save("z_a", epoch, {}, lease_ms=60_000, journal=True)
    assert fence.changed("z_a", [], 10) == []
    fence.release([early])  # was in before the journal began, ended after: told
    assert sorted(fence.changed("z_a", [], 10)) == ["1", "2"]
    fence.admit([late])
    assert sorted(fence.changed("z_a", [], 10)) == ["1", "2"]
    fence.release([intent("c", "1")])
    assert sorted(fence.changed("z_a", ["1", "2"], 10)) == ["1", "3"]
    fence.record_removal(late, ["9"], {})
    fence.release([late])
    assert sorted(fence.changed("z_a", ["1", "3"], 10)) == ["3", "9"]
    fence.save("z_a", epoch, {}, lease_ms=60_000, journal=False)
    assert fence.changed("z_a", [], 10) == []


def test_vectors_of_another_model_than_the_rebuilt_collections_are_refused(fence: Any) -> None:
    epoch = fence.begin("z_a", "one", 60_000).epoch
    fence.save("z_a", epoch, {"live_model": "new"}, lease_ms=60_000)
    old, new, any_model = (intent(name)._replace(model=name) for name in ("old", "new", ""))
    answers = fence.admit([old, new, any_model])
    assert [(answer.verdict, answer.model) for answer in answers] == [
        ("model", "new"),
        ("in", ""),
        ("in", ""),
    ]
