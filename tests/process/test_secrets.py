"""Passwords, tokens and keys of the service occur in no log line and no command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.redis_servers import running
from support.service import Service, eventually, service

pytestmark = pytest.mark.process

SECRETS = {
    "redis password": "correct-horse-battery",
    "milvus token": "root-of-milvus-7f3a",
    "postgres password": "staple-under-ground",
    "llm key": "sk-novel-0123456789abcdef",
    "collector key": "otlp-key-5566778899",
}


@pytest.fixture(scope="module")
def blabbing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that was given every secret there is by its environment, with a handler that tells."""
    folder = tmp_path_factory.mktemp("blabbing")
    for part in ("store", "service"):
        (folder / part).mkdir()
    with running("valkey", folder / "store") as server:
        server.client.config_set("requirepass", SECRETS["redis password"])
        environment = {
            "JOBWORKER_REDIS_URL": f"redis://:{SECRETS['redis password']}@127.0.0.1:{server.port}/0",
            "JOBWORKER_MILVUS_TOKEN": f"root:{SECRETS['milvus token']}",
            "JOBWORKER_POSTGRES_DSN": f"host=db user=u password={SECRETS['postgres password']}",
            "JOBWORKER_LLM_KEY": SECRETS["llm key"],
            "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={SECRETS['collector key']}",
        }
        with service(
            folder / "service", {"blab": "support.blabber:Blabber"}, environment=environment, procs=1,
            max_retries=0, log_level="debug",
        ) as one:  # fmt: skip
            yield one


def command_lines() -> str:
    """Of all processes of the machine that may be looked at."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # ended while we looked
    return "\n".join(found)


def test_no_secret_is_in_a_log_line_a_page_or_a_command_line(blabbing: Service) -> None:
    id = blabbing.enqueue("blab", {"text": "x"}, tenant_id="t1", project_id="p1",
                          metadata={"request_id": "r1", "trace_id": "tr1"})  # fmt: skip
    blabbing.dead_letter(id)
    lost = eventually(lambda: blabbing.logged("lost"))[0]
    given_up = eventually(lambda: blabbing.logged("job.dead_lettered"))[0]
    pages = [blabbing.get(path)[1] for path in ("/metrics", "/status", "/readyz", "/healthz")]
    seen = "\n".join([blabbing.log_text, command_lines(), *pages])
    assert [name for name, secret in SECRETS.items() if secret in seen] == []
    assert "***" in lost["exception"], "it was said, and taken out"
    identity = {"job_id": id, "task_type": "blab", "tenant_id": "t1", "project_id": "p1",
                "request_id": "r1", "trace_id": "tr1", "service": "jobworker"}  # fmt: skip
    for event in (lost, given_up):
        assert identity.items() <= event.items()


def test_every_line_is_an_event(blabbing: Service) -> None:
    for line in blabbing.log_text.splitlines():
        assert {"timestamp", "level", "msg", "service", "role"} <= json.loads(line).keys()


def test_a_flood_of_one_event_is_counted_instead_of_printed(blabbing: Service) -> None:
    blabbing.enqueue_many({"type": "blab"} for _ in range(250))
    blabbing.wait_until_drained()
    summary = eventually(lambda: blabbing.logged("log.suppressed", event="flood"), within_s=30)[0]
    printed = len(blabbing.logged("flood", role="worker 0"))
    assert printed + sum(e["times"] for e in blabbing.logged("log.suppressed", event="flood")) == 251
    assert printed <= 201, "the first hundred of each ten seconds"
    assert summary["level"] == "warning"
