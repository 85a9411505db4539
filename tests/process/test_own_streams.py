"""A service with streams and types of its own: the verbs and producers find them without being told."""

import json
import re
import shlex
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from jobworker.worker.cli import main
from support.operator import findings, run, run_json
from support.redis_servers import RedisServer
from support.service import Service, eventually, handlers, service

pytestmark = pytest.mark.process

STREAM = "jobs:wc"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    toys = handlers("Noop", "Permanent")
    with service(tmp_path_factory.mktemp("own"), toys, stream=f"{STREAM}=workers", instance="own") as one:
        eventually(lambda: one.client.hlen("jobworker:services"))
        yield one


@pytest.fixture
def dead(live: Service) -> Iterator[str]:
    """The id of a job that was dead-lettered."""
    live.client.delete(f"dlq:{STREAM}")
    live.client.xadd(STREAM, {"data": json.dumps({"id": "dead", "type": "permanent"})})
    eventually(lambda: live.client.xlen(f"dlq:{STREAM}"))
    yield "dead"
    live.client.delete(f"dlq:{STREAM}")


def test_depths_are_those_of_its_streams(live: Service) -> None:
    for verb in (["stats"], ["top"]):
        streams = [(one["stream"], one["group"]) for one in run_json(live, *verb)["streams"]]
        assert streams == [(STREAM, "workers")], verb


def test_doctor_judges_its_streams(live: Service) -> None:
    by_level = findings(live, "--metrics-url", live.url, code=0)
    assert f"{STREAM}: read by" in " ".join(by_level["ok"])
    assert "stream:story:gen" not in json.dumps(by_level)


def test_dead_letters_are_listed_and_the_command_of_explain_works(live: Service, dead: str) -> None:
    assert [one["job_id"] for one in run_json(live, "dlq", "list")["dead_letters"]] == [dead]
    again = re.search(r"send it again: +jobworker (.*)", run(live, "explain", dead).stdout)
    assert again is not None
    assert run_json(live, *shlex.split(again[1]))["requeued"] == 1


def test_an_empty_answer_names_the_streams_that_were_searched(live: Service) -> None:
    live.client.delete(f"dlq:{STREAM}")
    assert STREAM in run(live, "dlq", "list").stderr
    assert STREAM in run(live, "retry", "list").stderr
    assert STREAM in run(live, "dlq", "show", "missing", code=1).stderr


def test_the_group_of_a_registered_stream_may_be_left_out(live: Service) -> None:
    answer = run_json(live, "stats", "--stream", STREAM)
    assert [one["group"] for one in answer["streams"]] == ["workers"]


def test_advice_repeats_the_options_that_name_the_deployment(live: Service, dead: str) -> None:
    given = ["--data-dir", str(live.data_dir)]
    result = CliRunner().invoke(main, ["explain", dead, *given], env={"JOBWORKER_REDIS_URL": None})
    again = re.search(r"send it again: +jobworker (.*)", result.stdout)
    assert again is not None
    result = CliRunner().invoke(main, shlex.split(again[1]), env={"JOBWORKER_REDIS_URL": None})
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("verb", [["stats"], ["dlq", "list"], ["retry", "list"]], ids=" ".join)
def test_a_stream_that_does_not_exist_is_named(live: Service, verb: list[str]) -> None:
    result = run(live, *verb, "--stream", "jobs:cw=workers")
    assert "there is no stream 'jobs:cw': did you mean 'jobs:wc'?" in result.stderr


def test_a_misspelt_stream_without_group_is_refused(live: Service) -> None:
    assert "did you mean 'jobs:wc'?" in run(live, "stats", "--stream", "jobs:cw", code=2).stderr


def test_a_job_without_stream_reaches_the_service(live: Service) -> None:
    (id,) = run_json(live, "enqueue", "noop")["ids"]
    live.wait_for_end(id)
    assert not live.client.exists("stream:story:gen")


def test_a_type_that_no_service_is_known_for_is_noted(store: RedisServer) -> None:
    said = run(store, "enqueue", "wc").stderr
    assert "type wc go to stream:story:gen" in said
    assert "JOBWORKER_STREAM" in said
    assert run(store, "enqueue", "audit").stderr == ""


def test_a_malformed_job_is_found_by_its_id(live: Service) -> None:
    live.client.delete(f"dlq:{STREAM}")
    job = {"id": "broken", "type": "noop", "tenant_id": "t1", "timeout": "soon"}
    live.client.xadd(STREAM, {"data": json.dumps(job)})
    eventually(lambda: live.client.xlen(f"dlq:{STREAM}"))
    (found,) = run_json(live, "explain", "broken")["found"]
    assert (found["state"], found["type"], found["tenant_id"]) == ("dead", "noop", "t1")
    (letter,) = run_json(live, "dlq", "show", "broken")["dead_letters"]
    assert (letter["job_id"], letter["reason"]) == ("broken", "malformed")
    assert run_json(live, "dlq", "list", "--type", "noop")["dead_letters"] == [
        {name: value for name, value in letter.items() if name != "details"}
    ]
    run(live, "dlq", "purge", "broken", "--yes")
