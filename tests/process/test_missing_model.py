"""A missing model is one clear error at the start, which says how to get the model."""

import time
from pathlib import Path

import pytest

from support.service import Service, ending

pytestmark = pytest.mark.process

#: What is promised, from the command to its end.
TOLD_WITHIN_S = 5.0
#: The embedded stores start first, on a machine that may be busy with other suites.
SLACK_S = 40.0


def test_a_missing_model_ends_the_start_within_seconds_and_says_how_to_get_it(tmp_path: Path) -> None:
    (empty := tmp_path / "hub").mkdir()
    one = Service(
        tmp_path,
        {"embedding_batch": "jobworker.handlers.embedding.handler:EmbeddingBatch"},
        environment={"HF_HOME": str(empty), "HF_HUB_CACHE": str(empty)},
        model="BAAI/bge-m3",
    )
    with ending(one):
        launched_s = time.monotonic()
        one.launch()
        assert one.wait(60) == 3
        assert time.monotonic() - launched_s < TOLD_WITHIN_S + SLACK_S
        (told, *_) = one.logged("child.start_failed", role="supervisor")
        assert "hf download BAAI/bge-m3" in str(told["error"])
        assert str(empty) in str(told["error"])
        one.assert_nothing_left()
