"""Only the service's user can use the embedded stores of a running service."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from jobworker.handlers import BUILTIN
from jobworker.handlers.vectors.milvus.embedded import EmbeddedMilvus
from jobworker.handlers.vectors.milvus.store import VectorStoreError, open_vectors
from jobworker.worker.host.data_dir import DataDir
from jobworker.worker.supervision.embedded import EmbeddedValkey
from support.operator import findings
from support.service import Service, eventually, service

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

NAME = "story_segments"
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}
TEXTS = {f"r{number}": f"text {number}" for number in range(5)}
HANDLERS = {
    "embedding_batch": "support.embedding:Embedding",
    # The service brings a vector store along where a builtin handler needs one.
    "index_rebuild": "jobworker.handlers.rebuild.handler:IndexRebuild",
}
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with both stores of its own, which were filled by a job; its user's umask hides nothing."""
    before = os.umask(0o022)
    # A token for some other server must not be sent to this one.
    environment = {"JOBWORKER_MILVUS_TOKEN": "root:of-another-server"}
    try:
        with service(
            tmp_path_factory.mktemp("embedded"), HANDLERS, procs=1, environment=environment, log_level="debug"
        ) as one:
            one.enqueue("embedding_batch", {"ids": list(TEXTS), "texts": list(TEXTS.values())}, **SCOPE)
            one.wait_until_drained(WITHIN_S)
            yield one
    finally:
        os.umask(before)


def endpoints(one: Service) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((one.data_dir / "endpoints.json").read_text())
    return found


def secrets_of(one: Service) -> list[str]:
    """The passwords in the addresses of both stores."""
    found = [urlsplit(str(endpoints(one)[name])).password for name in ("redis_url", "milvus_uri")]
    assert all(secret and len(secret) >= 32 for secret in found), "both ask for one"
    return [str(secret) for secret in found]


def rows_at(uri: str) -> dict[str, str]:
    store = open_vectors(uri, timeout_s=5)
    try:
        return {row.id: row.text_content for row in store.get(NAME, list(TEXTS), **SCOPE)}
    finally:
        store.close()


def test_only_who_can_read_the_data_directory_reads_the_stores(embedded: Service) -> None:
    at = endpoints(embedded)
    assert embedded.dead_letters() == []
    assert rows_at(at["milvus_uri"]) == TEXTS
    with pytest.raises(VectorStoreError):
        rows_at(f"http://127.0.0.1:{urlsplit(at['milvus_uri']).port}")
    stranger = redis.Redis(port=urlsplit(at["redis_url"]).port or 0)
    with pytest.raises(redis.AuthenticationError):
        stranger.keys()
    stranger.close()


def test_their_secrets_are_in_no_command_line_environment_page_or_log(embedded: Service) -> None:
    everyone = embedded.everyone()
    assert {"valkey", "milvus"} <= embedded.roles().keys()
    environments = [Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace") for pid in everyone]
    pages = [embedded.get(path)[1] for path in ("/metrics", "/status", "/readyz", "/healthz")]
    seen = "\n".join([*everyone.values(), *environments, *pages, embedded.log_text])
    assert [secret for secret in secrets_of(embedded) if secret in seen] == []


def test_their_files_are_for_the_services_user_only(embedded: Service) -> None:
    folder = embedded.data_dir
    assert folder.stat().st_mode & 0o777 == 0o700
    # Also where the operator made the data directory, open to all.
    assert {path.name: oct(path.stat().st_mode & 0o077) for path in folder.iterdir()} == {
        path.name: "0o0" for path in folder.iterdir()
    }
    assert {"milvus", "milvus.token", "valkey", "endpoints.json"} <= {path.name for path in folder.iterdir()}


def test_the_doctor_gets_in_and_shows_no_secret_in_a_command_line(embedded: Service, tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("jobworker"), "doctor", "--json", f"--data-dir={embedded.data_dir}",
        "--model", str(tmp_path / "no-model"), f"--metrics-url={embedded.url}",
    ]  # fmt: skip
    environment = {**os.environ, "JOBWORKER_MILVUS_TOKEN": "root:of-another-server"}
    seen: set[str] = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=embedded.cwd, env=environment) as process:
        try:
            # What it starts works in the same folder.
            eventually(
                lambda: seen.update(embedded.everyone().values()) or process.poll() is not None, WITHIN_S
            )
            assert process.stdout is not None
            findings = json.loads(process.stdout.read())["findings"]
        finally:
            process.kill()
    assert any("jobworker.handlers.encoder.doctor" in line for line in seen), "it was looked at in time"
    assert [secret for secret in secrets_of(embedded) if secret in "\n".join(seen)] == []
    says = [(finding["level"], finding["says"]) for finding in findings if finding["subject"] == "Milvus"]
    assert ("ok", "version milvus_lite-3.2.2 (Lite)") in says, says
    assert [says for level, says in says if level == "wrong"] == []


def test_a_killed_one_comes_back_with_the_same_token(embedded: Service) -> None:
    at, killed = endpoints(embedded), embedded.kill_role("milvus")
    embedded.wait_for_successor("milvus", killed)
    eventually(lambda: len(embedded.logged("embedded.ready", store="milvus")) >= 2, WITHIN_S)
    assert endpoints(embedded) == at
    assert rows_at(at["milvus_uri"]) == TEXTS
    embedded.enqueue("embedding_batch", {"ids": ["late"], "texts": ["late"]}, **SCOPE)
    embedded.wait_until_drained(WITHIN_S)
    assert embedded.dead_letters() == []


def test_a_copied_data_directory_is_closed_again_and_an_empty_secret_is_replaced(tmp_path: Path) -> None:
    data = DataDir(str(tmp_path / "data"))
    kinds = EmbeddedValkey, EmbeddedMilvus
    try:
        first = [kind(data).url.rpartition("@")[0] for kind in kinds]
        for path in data.path.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert [kind(data).url.rpartition("@")[0] for kind in kinds] == first, "clients' settings stay good"
        for path in (data.path / "valkey", data.path / "milvus"):
            assert path.stat().st_mode & 0o777 == 0o700
        secrets = [data.path / "valkey/password", data.path / "milvus.token"]
        for path in secrets:
            assert path.stat().st_mode & 0o777 == 0o600
            path.write_text("")
        assert all(old != kind(data).url.rpartition("@")[0] for old, kind in zip(first, kinds, strict=True))
        assert all(path.read_text() for path in secrets)
    finally:
        data.close()


@contextmanager
def listener_on(port: int) -> Iterator[list[bytes]]:
    """A program of another user that takes a port; yields what it is sent."""
    received: list[bytes] = []
    with eventually(lambda: bound_to(port), WITHIN_S) as server:
        server.listen()

        def receive() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(1)
                    with contextlib.suppress(OSError):
                        received.append(connection.recv(4096))

        thread = threading.Thread(target=receive)
        thread.start()
        try:
            yield received
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def bound_to(port: int) -> socket.socket | None:
    """A socket on the port, or None while another program has it."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(("127.0.0.1", port))
    except OSError:
        server.close()
        return None
    return server


@pytest.mark.parametrize(("store", "name"), [("valkey", "redis_url"), ("milvus", "milvus_uri")])
def test_who_takes_the_port_of_a_store_that_is_down_is_sent_no_secret(
    embedded: Service, store: str, name: str
) -> None:
    before = urlsplit(endpoints(embedded)[name])
    pid = embedded.roles()[store]
    ready = len(embedded.logged("embedded.ready", store=store))
    os.kill(embedded.pid, signal.SIGSTOP)  # so that it does not start the store before the port is taken
    try:
        embedded.kill_role(store)
        with listener_on(before.port or 0) as received:
            os.kill(embedded.pid, signal.SIGCONT)
            embedded.wait_for_successor(store, pid)
            eventually(lambda: len(embedded.logged("embedded.ready", store=store)) > ready, WITHIN_S)
            eventually(lambda: urlsplit(endpoints(embedded)[name]).port != before.port, WITHIN_S)
            late = f"late-{store}"
            embedded.enqueue("embedding_batch", {"ids": [late], "texts": [late]}, **SCOPE)
            embedded.wait_until_drained(WITHIN_S)
    finally:
        os.kill(embedded.pid, signal.SIGCONT)
    assert received == []
    after = urlsplit(endpoints(embedded)[name])
    assert (after.username, after.password) == (before.username, before.password)
    assert embedded.dead_letters() == []


@pytest.mark.parametrize("lost", ["valkey", "valkey/appendonlydir"])
def test_a_folder_of_a_store_that_is_deleted_is_reported(tmp_path: Path, lost: str) -> None:
    with service(tmp_path, {"audit": BUILTIN["audit"]}, procs=1) as one:
        shutil.rmtree(one.data_dir / lost)
        eventually(lambda: not one.is_ready(), WITHIN_S, "the service notices")
        reasons = json.loads(one.get("/readyz")[1])["reasons"]  # others may say that the store is gone
        (reason,) = [text for text in reasons if "was deleted or replaced" in text]
        assert f"the folder {one.data_dir / lost} was deleted" in reason
        assert "restart the service" in reason
        assert len(one.logged("embedded.folder_lost")) == 1
        found = findings(one, "--metrics-url", one.url, code=1)["wrong"]
        assert any(str(one.data_dir / lost) in line for line in found)
