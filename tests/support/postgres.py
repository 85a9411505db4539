"""A real PostgreSQL server on a free port, in a folder of its own, run as a user without rights."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from support.redis_servers import free_port, tied
from support.tools import why_missing

PROGRAMS = ("initdb", "pg_ctl", "postgres")

#: initdb writes some 40 MB; a busy machine of two cores takes a few seconds for that.
START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0


def binaries() -> Path | None:
    """The folder with `initdb` and `postgres`; Debian keeps them out of PATH. None where there is none."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    folders = [*debian, *([Path(found).resolve().parent] if found else [])]
    return next((f for f in folders if all((f / name).exists() for name in PROGRAMS)), None)


def why_no_postgres() -> str | None:
    """Why no server can be started here, None where one can."""
    folder = binaries()
    if folder is None:
        return why_missing("postgresql", *PROGRAMS) or "postgresql: its programs are in different folders"
    if os.geteuid() != 0:
        return None
    if (user := _user()) is None:
        return "postgresql: it does not run as root, and there is no user postgres or nobody"
    try:
        # A clone below /root is closed to other users, and so are the programs in its environment.
        subprocess.run([folder / "initdb", "--version"], check=True, timeout=20, user=user, cwd="/",
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return f"postgresql: it does not run as root, and the user {user} cannot run {folder}/initdb"
    return None


def _user() -> str | None:
    """The user to run it as; ourselves if we are not root."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


class PostgresServer:
    """One server; its data lives as long as it does."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.dsn = f"host=127.0.0.1 port={self.port} user=jobs dbname=postgres"
        self._folder, self._data = folder, folder / "data"
        self._user = _user() if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        if self._user:
            shutil.chown(folder, self._user)
        self._do("initdb", "-D", str(self._data), "-U", "jobs", "-A", "trust", "--no-sync", "-E", "UTF8")

    def start(self) -> "PostgresServer":
        """Start it and wait until it takes connections."""
        binary = str(_binary("postgres"))
        options = ["-D", str(self._data), "-p", str(self.port), "-h", "127.0.0.1", "-k", "", "-F"]
        with (self._folder / "server.log").open("ab") as log:
            # QUIT it takes for an immediate end.
            command = tied("QUIT", [binary, *options])
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, user=self._user, cwd=self._folder
            )
        deadline = time.monotonic() + START_LIMIT_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.05)  # a port of another process has no event to wait on
        return self

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.dsn, connect_timeout=5):
                return True
        except psycopg.OperationalError:
            return False

    def stop(self) -> None:
        """End it at once, as a crash would, with all of its own processes."""
        if self._process is not None:
            self._do("pg_ctl", "stop", "-D", str(self._data), "-m", "immediate", "-s")
            self._process.wait(STOP_LIMIT_S)
            self._process = None

    def _do(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [_binary(name), *arguments], check=True, timeout=START_LIMIT_S, user=self._user, cwd=self._folder,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip


def _binary(name: str) -> Path:
    folder = binaries()
    assert folder is not None
    return folder / name


@contextmanager
def postgres() -> Iterator[PostgresServer]:
    """A running server; not below pytest's folders, which only their owner may enter."""
    with tempfile.TemporaryDirectory(prefix="jobworker-postgres", ignore_cleanup_errors=True) as folder:
        server = PostgresServer(Path(folder))
        try:
            yield server.start()
        finally:
            server.stop()
