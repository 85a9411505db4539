"""Priorities, lanes, and the tables of the configuration file."""

from typing import Any

import pytest

from jobworker.worker.errors import ConfigurationError
from jobworker.worker.flow import (
    FlowHeader,
    Lane,
    LaneRules,
    Limit,
    parse_flow,
    parse_limits,
    parse_weights,
    priority_of,
)


@pytest.mark.parametrize(
    ("given", "counts_as"),
    [
        ("0", 0),
        ("10", 10),
        ("7", 7),
        ("", 5),
        ("11", 5),
        ("-1", 5),
        ("05", 5),
        ("5.0", 5),
        ("high", 5),
        ("９", 5),
    ],
)
def test_what_is_no_priority_counts_as_five(given: str, counts_as: int) -> None:
    assert priority_of({"priority": given}) == counts_as
    assert priority_of(None) == priority_of({}) == 5


@pytest.mark.parametrize("tenant", ["", "t", "长/篇", "\u0000", "5/a", 'x["y"]'])
@pytest.mark.parametrize("keys", [(), ("a=b",), ("a=", 'q="')])
def test_a_lane_survives_its_name(tenant: str, keys: tuple[str, ...]) -> None:
    lane = Lane("type/长", 3, tenant, keys)
    assert Lane.decode(lane.encode()) == lane


def test_a_limit_divides_by_its_key() -> None:
    limits = [Limit(key, "a", key, 1) for key in ("tenant", "project", "global", "metadata.model")]
    job = FlowHeader("a", "t", "p", {"model": "m"})
    lane = Lane.decode(LaneRules(limits).name_of(job))
    assert lane.limit_keys == ("tenant=t", "project=t/p", "global=", "metadata.model=m")
    assert Lane.decode(LaneRules(limits).name_of(FlowHeader("b", "t"))).limit_keys == ()


def test_the_tables_of_the_file() -> None:
    flow = parse_flow(
        {
            "limit": [
                {"type": "a", "key": "tenant", "concurrency": 4, "rate": "100/min"},
                {"type": "b", "rate": "5/10s"},
            ],
            "weights": {"big": 2, "small": 0.5},
        }
    )
    assert flow is not None
    assert flow.limits == (
        Limit("a/tenant", "a", "tenant", 4, 100, 60_000),
        Limit("b/global", "b", "global", 0, 5, 10_000),
    )
    assert [limit.rate for limit in flow.limits] == ["100/min", "5/10s"]
    assert flow.weights == {"big": 2.0, "small": 0.5}
    assert parse_flow({}) is None
    other = parse_flow({"weights": {"big": 3}})
    assert other is not None
    assert other.origin != flow.origin


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"type": "a"},
        {"type": "a", "concurrency": 0},
        {"type": "a", "concurrency": -1},
        {"type": "a", "concurrency": True},
        {"type": "a", "concurrency": "4"},
        {"type": 1, "concurrency": 1},
        {"type": "a", "key": "user", "concurrency": 1},
        {"type": "a", "key": "metadata.", "concurrency": 1},
        {"type": "a", "rate": "fast"},
        {"type": "a", "rate": "0/s"},
        {"type": "a", "rate": "1/0s"},
        {"type": "a", "rate": "99999/s"},
        {"type": "a", "concurrency": 1, "colour": 1},
        {"type": "a", "concurrency": 1, "name": "a=b"},
        {"type": "a", "rate": 5},
    ],
)
def test_a_wrong_limit_is_refused_with_a_text_that_names_it(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"\[\[limit\]\]"):
        parse_limits([table])


def test_two_limits_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="twice"):
        parse_limits([{"type": "a", "concurrency": 1}, {"type": "a", "rate": "1/s"}])


@pytest.mark.parametrize("weight", [0, -1, "2", float("nan"), float("inf"), True, 5000])
def test_a_wrong_weight_is_refused(weight: Any) -> None:
    with pytest.raises(ConfigurationError, match="weights"):
        parse_weights({"t": weight})
