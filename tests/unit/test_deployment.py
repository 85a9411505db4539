"""The deployment that options name: streams, endpoints of a data directory, services."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobworker.worker.admin.deployment import Deployment, StreamTable, require_store_url
from jobworker.worker.errors import ConfigurationError
from jobworker.worker.extension import extension
from jobworker.worker.host.endpoints import read_endpoints
from jobworker.worker.keys import Source
from jobworker.worker.store.announcements import Announcement
from support.fake_operator import FakeOperatorStore


def store(*sources: Source) -> Any:
    fake = FakeOperatorStore()
    if sources:
        fake.announced = [Announcement("host/blue", frozenset({"wc"}), sources, 0.0)]
    return fake


def test_without_streams_those_of_the_registered_services_are_meant() -> None:
    table = StreamTable([])
    assert table.sources(store()) == table.latest == list(extension().streams)
    own = Source("jobs:wc", "workers")
    assert table.sources(store(own)) == table.latest == [own]
    other = Announcement("host/green", frozenset(), (own, Source("jobs:wc", "others")), 0.0)
    both = store(own)
    both.announced.append(other)
    assert table.sources(both) == [own, Source("jobs:wc", "others")]
    assert table.names(both) == ["jobs:wc"]


def test_a_default_or_registered_stream_needs_no_group() -> None:
    own, default = Source("jobs:wc", "workers"), extension().streams[0]
    table = StreamTable([default.stream, "jobs:wc", "a=b"])
    assert table.sources(store(own)) == [default, own, Source("a", "b")]
    assert StreamTable(["a"], need_group=False).sources(store()) == [Source("a", "")]
    with pytest.raises(ConfigurationError, match="NAME=GROUP"):
        StreamTable(["a"]).sources(store())
    with pytest.raises(ConfigurationError, match="NAME=GROUP"):
        StreamTable([""])


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
