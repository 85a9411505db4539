"""What operators see (metrics, health, process titles), and what must stay hidden: secrets."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.redis_servers import RedisServer, running
from support.service import STREAM, Service, eventually, handlers, service

pytestmark = pytest.mark.process

SECRET = "correct-horse-battery"
#: Dashboards rely on these buckets; smaller ones below a second are ours.
BUCKETS = ["1.0", "5.0", "10.0", "30.0", "60.0", "120.0", "300.0", "+Inf"]
NAMES = {
    "z_novel_jobs_queued": ("gauge", {"stream"}),
    "z_novel_jobs_completed_total": ("counter", {"task_type"}),
    "z_novel_jobs_failed_total": ("counter", {"task_type"}),
    "z_novel_jobs_retried_total": ("counter", {"task_type"}),
    "z_novel_jobs_dead_total": ("counter", {"task_type", "reason"}),
    "z_novel_redis_stream_lag": ("gauge", {"stream", "consumer_group"}),
    "z_novel_dlq_length": ("gauge", {"stream"}),
    "z_novel_retry_scheduled": ("gauge", {"stream"}),
    "z_novel_jobs_pending": ("gauge", {"stream"}),
    "z_novel_oldest_queued_seconds": ("gauge", {"stream"}),
    "z_novel_read_cycles_total": ("counter", set()),
    "z_novel_leases_taken_over_total": ("counter", {"stream"}),
    "z_novel_leases_lost_total": ("counter", {"stream"}),
    "z_novel_ready": ("gauge", set()),
    "z_novel_workers": ("gauge", {"state"}),
    "z_novel_worker_restarts_total": ("counter", {"role", "cause"}),
    "z_novel_embedded_tokens_total": ("counter", set()),
    "z_novel_truncated_tokens_total": ("counter", set()),
    "z_novel_job_duration_seconds_bucket": ("histogram", {"task_type", "le"}),
    "z_novel_job_wait_seconds_bucket": ("histogram", {"task_type", "le"}),
    "z_novel_batch_jobs_bucket": ("histogram", {"le"}),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server with a password, which its own command line does not show either."""
    with running("valkey", tmp_path_factory.mktemp("store")) as server:
        server.client.config_set("requirepass", SECRET)
        yield server


@pytest.fixture(scope="module")
def observed(store: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service on a store of others, told by the environment; some jobs of every fate are done."""
    environment = {"JOBWORKER_REDIS_URL": f"redis://:{SECRET}@127.0.0.1:{store.port}/0"}
    toys = handlers("Noop", "Flaky", "Permanent", "Die", "Batch")
    options = {"retry_initial": 0.05, "max_retries": 2, "instance": "green"}
    with service(tmp_path_factory.mktemp("observed"), toys, environment=environment, **options) as one:
        yield one


def fates(one: Service) -> None:
    """Jobs of every fate: 60 fine, one fine after a retry, one exhausted, one permanent, one malformed."""
    stamp = {"created_at": "2026-01-02T10:00:00.123456789Z"}  # nanoseconds, as Go writes them
    one.enqueue_many({"type": "noop", **stamp} for _ in range(40))
    one.enqueue_many({"type": "batch", "payload": {}, **stamp} for _ in range(20))
    one.enqueue("flaky", {"times": 1})
    letters = [one.enqueue("flaky", {"times": 9}), one.enqueue("permanent"), one.add_raw({"data": b"?"})]
    for letter in letters:
        one.dead_letter(letter)
    one.wait_until_drained()


def test_metrics_have_the_agreed_names_and_agree_with_what_happened(observed: Service) -> None:
    fates(observed)
    died = observed.enqueue("die", {"how": "SIGKILL"}, retry_count=2)
    assert observed.dead_letter(died)["reason"] == "poison"

    def completed(kind: str) -> float:
        return observed.metric("z_novel_jobs_completed_total", task_type=kind)

    eventually(lambda: (completed("noop"), completed("batch"), completed("flaky")) == (40, 20, 1))
    eventually(lambda: observed.metric("z_novel_dlq_length", stream=STREAM) == 4)
    found: dict[str, set[str]] = {}
    for name, labels in observed.metrics():
        found.setdefault(name, set()).update(label for label, _ in labels)
    assert {name: found.get(name) for name in NAMES} == {name: labels for name, (_, labels) in NAMES.items()}
    page = observed.get("/metrics")[1]
    for name, (kind, _) in NAMES.items():
        assert re.search(rf"^# TYPE {name.removesuffix('_bucket')} {kind}$", page, re.MULTILINE), name
    assert observed.metric("z_novel_jobs_failed_total", task_type="flaky") == 1 + 3
    assert observed.metric("z_novel_jobs_retried_total", task_type="flaky") == 1 + 2
    assert observed.metric("z_novel_jobs_dead_total", task_type="flaky", reason="exhausted") == 1
    assert observed.metric("z_novel_jobs_dead_total", task_type="permanent", reason="permanent") == 1
    assert observed.metric("z_novel_jobs_dead_total", task_type="unknown", reason="malformed") == 1
    assert observed.metric("z_novel_jobs_queued", stream=STREAM) == 0
    assert observed.metric("z_novel_worker_restarts_total", role="worker", cause="SIGKILL") >= 1


def test_histograms_count_every_try_in_the_agreed_buckets(observed: Service) -> None:
    before = observed.metric("z_novel_job_duration_seconds_count", task_type="noop")
    observed.enqueue_many({"type": "noop", "created_at": "2026-01-02T10:00:00Z"} for _ in range(7))
    eventually(lambda: observed.metric("z_novel_job_duration_seconds_count", task_type="noop") == before + 7)
    metrics = observed.metrics()
    for name in ("z_novel_job_duration_seconds", "z_novel_job_wait_seconds"):
        bounds = [dict(labels)["le"] for metric, labels in metrics
                  if metric == f"{name}_bucket" and ("task_type", "noop") in labels]  # fmt: skip
        assert [bound for bound in bounds if bound == "+Inf" or float(bound) >= 1] == BUCKETS
    assert observed.metric("z_novel_job_wait_seconds_bucket", task_type="noop", le="300.0") == 0, "years ago"
    assert observed.metric("z_novel_job_duration_seconds_bucket", task_type="noop", le="1.0") >= 7


def test_jobs_of_a_silent_host_are_counted_when_they_are_taken_over(
    store: RedisServer, tmp_path: Path
) -> None:
    stream = "stream:lost:host"
    store.client.xgroup_create(stream, "group", id="0", mkstream=True)
    id = store.client.xadd(stream, {"data": '{"id": "orphan", "type": "noop"}'})
    store.client.xreadgroup("group", "a/host/that/is/gone", {stream: ">"})
    url = f"redis://:{SECRET}@127.0.0.1:{store.port}/0"
    options: dict[str, object] = {"redis_url": url, "procs": 1, "lease": 1, "stream": f"{stream}=group"}
    with service(tmp_path, handlers("Noop"), **options) as one:
        one.wait_for_end("orphan")
        eventually(lambda: one.metric("z_novel_leases_taken_over_total", stream=stream) == 1, saying=id)


def test_the_workers_gauge_says_what_they_do(observed: Service) -> None:
    def workers() -> dict[str, float]:
        states = ("starting", "idle", "busy", "stopping")
        return {state: observed.metric("z_novel_workers", state=state) for state in states}

    eventually(lambda: workers() == {"starting": 0, "idle": 2, "busy": 0, "stopping": 0})


def test_every_process_names_itself_and_its_instance(observed: Service) -> None:
    roles = ("forkserver", "guard", "reader", "reaper", "supervisor", "worker 0", "worker 1")
    titles = [f"jobworker: {role} [green]" for role in roles]
    eventually(lambda: sorted(observed.everyone().values()) == titles)


def test_no_memory_of_it_has_a_name_that_could_be_left_behind(observed: Service) -> None:
    for pid in observed.everyone():
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "/dev/shm/" not in maps
        opened = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
        assert not [path for path in opened if path.startswith("/dev/shm/")]


def test_unknown_pages_are_not_found(observed: Service) -> None:
    assert observed.get("/secrets")[0] == 404


def test_readiness_follows_the_store_and_secrets_stay_out_of_every_page_and_line(
    observed: Service, store: RedisServer
) -> None:
    assert observed.get("/readyz")[0] == 200
    store.kill()
    eventually(lambda: observed.get("/readyz")[0] == 503)
    assert observed.get("/healthz")[0] == 200, "a restart would not mend the store"
    pages = [observed.get(path)[1] for path in ("/readyz", "/healthz", "/metrics")]
    store.start()
    store.client.config_set("requirepass", SECRET)
    observed.wait_until_ready()
    observed.wait_for_end(observed.enqueue("noop"))
    commands = observed.everyone().values()
    assert SECRET not in "".join([*pages, *commands, observed.log_text])


def test_the_embedded_stores_password_is_in_no_command_line_and_no_log(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Noop"), procs=1) as one:
        password = re.match("redis://default:(.+)@", one.redis_url)
        assert password is not None
        assert one.everyone().keys() >= set(one.roles().values())
        assert password[1] not in "".join([*one.everyone().values(), one.log_text])
        readable = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
        assert not [path for path in readable if password[1].encode() in path.read_bytes()]
