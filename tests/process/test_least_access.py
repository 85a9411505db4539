"""The access list in deploy/acl is enough for a service and for each verb of the command line."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobworker.worker import Producer
from jobworker.worker.cli import main
from support.redis_servers import RedisServer, running
from support.service import STREAM, eventually, handlers, service

pytestmark = pytest.mark.process

ACCESS = Path(__file__).resolve().parents[2] / "deploy/acl/jobworker.acl"
CONFIG = """
[[cron]]
name = "yearly"
schedule = "0 0 1 1 *"
type = "noop"
stream = "%s"
"""


def restrict(server: RedisServer) -> str:
    """Give the server the user of the file; returns the URL for it."""
    words = ACCESS.read_text("utf-8").split()
    assert words[0] == "user"
    server.client.execute_command("ACL", "SETUSER", *words[1:])
    server.client.execute_command("ACL", "LOG", "RESET")
    return server.url.replace("//", "//jobworker:PASSWORD@")


def verb(url: str, *words: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, [*words], env={"JOBWORKER_REDIS_URL": url})
    assert done.exit_code == code, (words, done.output, done.exception)
    return done.stdout


def use_every_verb(url: str, metrics_url: str, finished: str, dead: list[str]) -> None:
    beside = ("--metrics-url", metrics_url)
    verb(url, "stats", "--stream", STREAM, "--json")
    verb(url, "explain", finished, "--stream", STREAM)
    verb(url, "result", finished, "--stream", STREAM)
    verb(url, "doctor", *beside, "--json", code=1)  # it has dead letters
    verb(url, "dlq", "list", "--stream", STREAM)
    verb(url, "dlq", "show", dead[0], "--stream", STREAM)
    verb(url, "dlq", "requeue", dead[0], "--stream", STREAM)
    verb(url, "dlq", "purge", dead[1], "--stream", STREAM, "--yes")
    verb(url, "retry", "list", "--stream", STREAM)
    verb(url, "retry", "now", "--all", "--stream", STREAM)
    for words in (
        ["set", "noop", "--key", "global", "--concurrency", "5"],
        ["list"],
        ["clear", "noop/global"],
    ):
        verb(url, "limit", *words, "--stream", STREAM)
    for words in (["set", "t1", "3"], ["list"], ["clear", "t1"]):
        verb(url, "weight", *words, "--stream", STREAM)
    verb(url, "pause", "noop")
    verb(url, "resume", "noop")
    waiting = verb(url, "enqueue", "noop", "--payload", "{}", "--delay", "3600", "--stream", STREAM).split()[
        0
    ]
    verb(url, "cancel", waiting, "--stream", STREAM)
    for words in (["list"], ["pause", "yearly"], ["resume", "yearly"], ["run", "yearly"]):
        verb(url, "cron", *words, "--stream", STREAM)
    batch = json.loads(verb(url, "batch", "list", "--stream", STREAM, "--json"))
    assert batch
    verb(url, "erase", "--tenant", "t1", "--project", "p1", "--yes")
    verb(url, "usage", "--tenant", "t1")


def test_it_is_enough_for_a_service_and_every_verb(tmp_path: Path) -> None:
    folder, config = tmp_path / "service", tmp_path / "service.toml"
    folder.mkdir()
    config.write_text(CONFIG % STREAM)
    toys = handlers("Noop", "Permanent") | {"vectors_delete": "support.toys:Noop"}
    with running("valkey", tmp_path) as server:
        url = restrict(server)
        with service(folder, toys, procs=1, redis_url=url, config=config, wait_replicas=0) as one:
            with Producer(url) as producer:
                finished = producer.enqueue(
                    "noop", {}, stream=STREAM, tenant_id="t1", project_id="p1", keep_result=True,
                    metadata={"idempotency_key": "k"},
                )  # fmt: skip
                producer.result(finished, stream=STREAM, timeout=30)
                with producer.batch() as batch:
                    batch.enqueue("noop", {}, stream=STREAM)
                producer.enqueue("noop", {}, stream=STREAM, delay=3600)
                dead = [producer.enqueue("permanent", {}, stream=STREAM) for _ in range(2)]
            for id in dead:
                eventually(lambda id=id: id in verb(url, "dlq", "list", "--stream", STREAM))
            use_every_verb(url, one.logged("health.listening")[0]["metrics_url"], finished, dead)
        # Redis 7.0 does not know CLIENT SETINFO, so the file cannot allow it. The client ignores a refusal.
        refused = [one for one in server.client.acl_log() if one["object"] != "client|setinfo"]
        assert not refused
