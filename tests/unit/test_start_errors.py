"""What the service refuses before it runs."""

import resource

import pytest

from jobworker.worker.errors import ConfigurationError
from jobworker.worker.supervision.start_errors import require_open_files


@pytest.mark.parametrize(("allowed", "workers"), [(120, 1), (200, 16)])
def test_a_limit_on_open_files_that_is_too_low_is_refused_with_the_number_needed(
    monkeypatch: pytest.MonkeyPatch, allowed: int, workers: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    with pytest.raises(ConfigurationError, match=rf"only {allowed} open files .* need \d+: .*ulimit -n"):
        require_open_files(workers)


@pytest.mark.parametrize("allowed", [128, 1024, resource.RLIM_INFINITY])
def test_a_usual_limit_on_open_files_is_accepted(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    require_open_files(1)
