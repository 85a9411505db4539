"""The model of a deployment finds the stage that limits it."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("simulate", BENCH / "simulate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "simulate", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("case", "per_s", "limit"),
    [
        ({"workers": 2, "job_s": 0.01}, 200, "workers"),
        ({"hosts": 3, "workers": 2, "job_s": 0.01}, 600, "workers"),
        ({"workers": 16, "job_s": 0.01, "cpu_s": 0.01, "cores": 4}, 400, "processors"),
        ({"workers": 8, "cores": 8}, 100_000, "reader"),
        ({"hosts": 8, "workers": 8, "cores": 8}, 200_000, "server"),
        ({"hosts": 8, "workers": 8, "cores": 8, "masters": 2}, 400_000, "server"),
    ],
)
def test_the_slowest_stage_decides(model: Any, case: dict[str, Any], per_s: float, limit: str) -> None:
    found = model.simulate(model.Case(**case), model.Costs(5.0, 10.0, 6.0))
    assert found.jobs_per_s == pytest.approx(per_s, rel=0.05)
    assert found.limit == limit
