"""Disposable Debian containers that boot a real systemd (needs root)."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
#: Packages of the service's host: an interpreter (with a dependency of the Redis client before Python
#: 3.11.3), the job store, OpenMP for torch.
_PACKAGES = (
    "systemd,systemd-sysv,dbus,python3,python3-venv,python3-async-timeout,libgomp1,redis-server,procps"
)
_BASE_WITHIN_S = 900.0
_BOOT_WITHIN_S = 90.0
_END_WITHIN_S = 60.0
#: systemd-nspawn needs a file system of its own here if no systemd runs outside.
_RUN = Path("/run/systemd/nspawn")
#: Environment of commands inside; it takes nothing from this host.
_ENVIRONMENT = {"PATH": "/opt/jobworker/bin:/usr/bin:/usr/sbin:/bin:/sbin", "LC_ALL": "C.UTF-8"}
_MEMORY = Path("/sys/fs/cgroup/memory")


def make_base(base: Path) -> None:
    """Create the base system of every run with debootstrap, unless it exists."""
    done = base / "done"
    if done.exists() and done.read_text() == _PACKAGES:
        return
    shutil.rmtree(base, ignore_errors=True)
    (base / "root").mkdir(parents=True)
    command = [
        "debootstrap",
        "--variant=minbase",
        f"--include={_PACKAGES}",
        SUITE,
        str(base / "root"),
        MIRROR,
    ]
    with (base / "log").open("wb") as log:
        subprocess.run(command, check=True, timeout=_BASE_WITHIN_S, stdout=log, stderr=log)
    done.write_text(_PACKAGES)


class Machine:
    """Container on an overlay of the base, deleted on exit. Enter it, fill `root`, then `boot`."""

    def __init__(self, base: Path, memory_mib: int) -> None:
        self._base = base / "root"
        self._work = base / f"run-{os.getpid()}"
        self.root = self._work / "root"
        self._memory = _Memory(memory_mib)
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> "Machine":
        for folder in (self.root, self._work / "upper", self._work / "work"):
            folder.mkdir(parents=True)
        layers = f"lowerdir={self._base},upperdir={self._work}/upper,workdir={self._work}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._nspawn is not None:
            self._end(self._nspawn)
        subprocess.run(["umount", str(self.root)], check=True)
        shutil.rmtree(self._work)
        self._memory.close()

    def prepare(self, *command: str) -> None:
        """Run a command in the container before it boots."""
        subprocess.run(
            ["chroot", str(self.root), *command], check=True, timeout=_BOOT_WITHIN_S, env=_ENVIRONMENT,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def boot(self, bound: dict[Path, str]) -> None:
        """Boot systemd, with folders of this host mounted read-only."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_own_file_system(_RUN))
            command = [
                "systemd-nspawn", "--register=no", "--keep-unit", "--quiet", "--boot", "--private-network",
                f"--directory={self.root}", *(f"--bind-ro={ours}:{theirs}" for ours, theirs in bound.items()),
            ]  # fmt: skip
            console = stack.enter_context((self._work / "console").open("wb"))
            self._nspawn = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                preexec_fn=self._memory.enter,
            )
            wait_for("boot", self._booted, _BOOT_WITHIN_S)

    def _booted(self) -> bool:
        assert self._nspawn is not None
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        self._leader = int(children[0]) if children else 0
        if not self._leader or Path(f"/proc/{self._leader}/comm").read_text().strip() != "systemd":
            return False
        return self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    def run(self, *command: str, within_s: float = _BOOT_WITHIN_S) -> "subprocess.CompletedProcess[str]":
        """Run a command in the container as root; never raises for its exit code."""
        inside = ["nsenter", f"--target={self._leader}", "--all", "--", *command]
        return subprocess.run(
            inside, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=within_s, check=False, env=_ENVIRONMENT,
        )  # fmt: skip

    def _end(self, nspawn: "subprocess.Popen[bytes]") -> None:
        """Power off gracefully, then kill."""
        if nspawn.poll() is None:
            nspawn.send_signal(signal.SIGTERM)
            try:
                nspawn.wait(_END_WITHIN_S)
            except subprocess.TimeoutExpired:
                nspawn.kill()
                nspawn.wait(_END_WITHIN_S)


class _Memory:
    """Control group (version 1) that limits the memory of a container; units inside have no group of their
    own to limit."""

    def __init__(self, mib: int) -> None:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
        self._group = _MEMORY / own.rpartition(":")[2].lstrip("/") / f"jobworker-machine-{os.getpid()}"
        self._group.mkdir()
        (self._group / "memory.limit_in_bytes").write_text(f"{mib}M")

    def enter(self) -> None:
        """Move this process, and so its later children, into the group."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        """Remove the group once it is empty."""
        wait_for(
            "the control group to be empty", lambda: not (self._group / "cgroup.procs").read_text(), 10.0
        )
        self._group.rmdir()


@contextlib.contextmanager
def _own_file_system(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_mount():
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def wait_for(what: str, look: Callable[[], object], within_s: float) -> float:
    """Wait until `look` is true; returns the seconds. Raises TimeoutError."""
    began_s = time.monotonic()
    while not look():
        if time.monotonic() - began_s > within_s:
            raise TimeoutError(f"{what}: not within {within_s:.0f} s")
        time.sleep(0.1)  # a container sends no event
    return time.monotonic() - began_s


def missing(programs: Sequence[str]) -> list[str]:
    """The programs that are not installed."""
    return [name for name in programs if shutil.which(name) is None]
