"""Memory of the processes stays bounded, however large the jobs and however long they wait."""

import signal
from pathlib import Path

import pytest

from support.redis_servers import running
from support.service import GROUP, STREAM, Service, eventually, handlers, service

pytestmark = pytest.mark.process

MIB = 1024 * 1024
#: As large as jobs may be; a reader that took all that its workers have rows for would hold them all.
JOB_BYTES, JOBS = 8 * MIB - 1024, 32
#: What a reader may come to: what may wait in it, one answer, the copies made on the way, and itself.
MOST_MIB = 220


def peak_mib(pid: int) -> int:
    """The most memory that a process ever held."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


def send_large(one: Service, count: int) -> list[str]:
    """Send jobs that wait at a gate, one transaction each."""
    return [one.enqueue("crowd", {"gate": "0", "text": "x" * JOB_BYTES}) for _ in range(count)]


def test_the_largest_jobs_do_not_pile_up_in_the_reader(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "one").mkdir()
    with (
        running("valkey", tmp_path / "redis") as server,
        service(tmp_path / "one", handlers("Crowd", "Batch"), redis_url=server.url) as one,
    ):
        # After small ones much is asked for at once. Stuck workers run no job: behind a job that
        # takes long, the reader would ask for nothing more.
        one.enqueue_many({"type": "batch", "payload": {}} for _ in range(600))
        one.wait_until_drained()
        workers = [role for role in one.roles() if role.startswith("worker")]
        for worker in workers:
            one.kill_role(worker, signal.SIGSTOP)
        jobs = send_large(one, JOBS // 2)  # fewer: a worker that makes no progress for 15 s is killed
        eventually(lambda: one.client.xpending(STREAM, GROUP)["pending"] >= 8)
        for worker in workers:
            one.kill_role(worker, signal.SIGCONT)
        jobs += send_large(one, JOBS - len(jobs))
        one.wait_for_start(jobs[0])
        assert peak_mib(one.roles()["reader"]) < MOST_MIB
        one.wait_for_successor("reader", one.kill_role("reader"))  # the new one finds the same jobs pending
        one.open_gate("0")
        for job in jobs:
            one.wait_for_end(job, within_s=60)
        one.wait_until_drained()
        peaks = {role: peak_mib(pid) for role, pid in one.roles().items()}
        assert max(peaks.values()) < MOST_MIB, peaks
        assert one.dead_letters() == []
