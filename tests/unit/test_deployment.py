"""The deployment that options name: streams, endpoints of a data directory, services."""

import json
from pathlib import Path

import pytest

from jobworker.worker.admin.deployment import Deployment, parse_sources, require_store_url
from jobworker.worker.endpoints import read_endpoints
from jobworker.worker.errors import ConfigurationError
from jobworker.worker.extension import extension
from jobworker.worker.keys import Source


def test_without_streams_the_default_ones_are_meant() -> None:
    assert parse_sources([]) == list(extension().streams)


def test_a_default_stream_needs_no_group() -> None:
    assert parse_sources([extension().streams[0].stream, "a=b"]) == [extension().streams[0], Source("a", "b")]
    assert parse_sources(["a"], need_group=False) == [Source("a", "")]
    with pytest.raises(ConfigurationError, match="NAME=GROUP"):
        parse_sources(["a"])


def test_the_endpoints_are_those_that_the_service_wrote(tmp_path: Path) -> None:
    assert read_endpoints(str(tmp_path / "none")) == {}
    assert not (tmp_path / "none").exists(), "reading makes no directory"
    assert read_endpoints(str(tmp_path)) == {}
    (tmp_path / "endpoints.json").write_text(json.dumps({"redis_url": "redis://x"}))
    assert read_endpoints(str(tmp_path)) == {"redis_url": "redis://x"}


def test_a_missing_url_is_refused_with_the_options_that_give_one() -> None:
    with pytest.raises(ConfigurationError, match="--redis-url"):
        require_store_url("")


def test_services_that_do_not_answer_are_left_out() -> None:
    deployment = Deployment("redis://x", ("http://127.0.0.1:1",), False)
    assert deployment.answering_services() == []
    assert [service.status for service in deployment.services()] == [{}]
