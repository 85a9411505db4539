"""Failed starts: the exit code that scripts rely on, and a message that says what to change."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.redis_servers import free_port
from support.service import COMMAND, Service, ending, eventually, handlers, service

pytestmark = pytest.mark.process

#: An interpreter's start and end on a machine that may be busy with other suites, beside what is waited for.
SLACK_S = 40.0


def refused(folder: Path, *arguments: str) -> str:
    """Run the command with arguments that it must not take: exit code 2; returns what it says."""
    done = subprocess.run(
        [COMMAND, *arguments, f"--data-dir={folder / 'data'}"],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "data" / "valkey" / "valkey.conf").exists(), "nothing was started"
    return done.stderr


def end_of(one: Service, within_s: float = 60) -> int:
    """Launch a service that cannot start; returns its exit code."""
    with ending(one):
        one.launch()
        code = one.wait(within_s)
        one.assert_nothing_left()
        return code


@pytest.mark.parametrize(("arguments", "said"), [
    (["--procs", "0"], "--procs"),
    (["--no-such-option"], "--no-such-option"),
    (["--handler", "shout"], "TYPE=module:Class"),
    (["--stream", "stream:story:gen"], "NAME=GROUP"),
    (["--metrics-addr", "everywhere"], "HOST:PORT"),
    (["--redis-url", "localhost:6379"], "redis://host:6379/0"),
    (["--redis-url", "redis://h?foo=1"], "'foo'"),
    (["--milvus-uri", "localhost:19530"], "--milvus-uri"),
    (["--lease", "nan"], "--lease"),
    (["--no-builtin-handlers"], "no handler"),
    (["--app", "no_such_module"], "there is no module no_such_module"),
    (["--app", "my_app.py"], "for example my_app"),
    (["--app", "json", "--no-builtin-handlers"], "no handler found in"),
    (["--config", "absent.toml"], "absent.toml"),
])  # fmt: skip
def test_bad_usage_exits_2_and_names_the_option(tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in refused(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("text", "said"), [("procs = ", "bad.toml"), ("prox = 3", "prox"), ('procs = "many"', "many")]
)
def test_a_bad_config_file_exits_2_and_says_where(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    assert said in refused(tmp_path, "--config", "bad.toml")


@pytest.mark.parametrize("arguments", [["--procs", "two"], ["--stream", "x"], ["--config", "bad.toml"]])
def test_bad_usage_is_a_line_of_the_json_log(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "bad.toml").write_text("procs = 'two'")
    (line,) = refused(tmp_path, *arguments).splitlines()
    event = json.loads(line)
    assert (event["msg"], event["level"]) == ("config.invalid", "critical")
    assert arguments[0] in event["error"]
    (*_, last) = refused(tmp_path, *arguments, "--log-format", "text").splitlines()
    assert arguments[0] in last
    assert not last.startswith("{")


def test_a_number_in_words_is_refused_plainly(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("procs = 'two'")
    assert "procs: 'two' is not a whole number" in refused(tmp_path, "--config", "bad.toml")
    assert "513 is not between 1 and 512" in refused(tmp_path, "--procs", "513")


def test_a_taken_metrics_port_exits_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = refused(
            tmp_path, "--metrics-addr", address, "--handler=noop=support.toys:Noop", "--no-builtin-handlers"
        )
    assert "in use" in said
    assert f"--metrics-addr {address}" in said


def test_a_taken_port_of_the_embedded_valkey_exits_2_and_names_the_option(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refused(
            tmp_path, "--valkey-port", port, "--handler=noop=support.toys:Noop", "--no-builtin-handlers"
        )
    assert f"--valkey-port {port}: 127.0.0.1:{port}: Address already in use" in said


def test_command_line_wins_over_environment_and_that_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "service.toml"
    config.write_text('lease = 11\nmax-retries = 1\nretry-max = 9\nhandler = ["noop=support.toys:Noop"]\n')
    environment = {"JOBWORKER_MAX_RETRIES": "2", "JOBWORKER_RETRY_MAX": "8"}
    with ending(Service(tmp_path, {}, environment=environment, config=config, retry_max=7)) as one:
        one.launch()
        (starting,) = eventually(lambda: one.logged("supervisor.starting"))
        assert one.terminate() == 0
    settings = starting["settings"]
    assert (settings["lease_s"], settings["retry"][0], settings["retry"][2]) == (11, 2, 7)
    assert settings["handlers"] == {"noop": "support.toys:Noop"}


@pytest.mark.parametrize(("target", "said"), [
    ("no_such_module:Thing", "No module named 'no_such_module'"),
    ("support.toys:NoSuchClass", "NoSuchClass"),
    ("support.toys:Event", "Event"),
    ("support.toys:Unable", "the licence has run out"),
    ("support.toys:Speechless", "SpeechlessError: (its message raised RuntimeError)"),
])  # fmt: skip
def test_a_handler_that_cannot_be_set_up_exits_3_with_its_own_error(
    tmp_path: Path, target: str, said: str
) -> None:
    one = Service(tmp_path, {"job": target}, procs=1)
    assert end_of(one) == 3
    assert said in one.log_text
    assert any(
        said in str(event.get("error", "")) for event in one.logged("child.start_failed", role="supervisor")
    )


def test_an_unreachable_store_exits_5_when_the_connect_timeout_is_over(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url = f"redis://:wrong-horse@127.0.0.1:{port}/0"
    one = Service(tmp_path, handlers("Noop"), procs=1, redis_url=url, connect_timeout=1)
    launched_s = time.monotonic()
    assert end_of(one) == 5
    assert 1.0 <= time.monotonic() - launched_s < 1.0 + SLACK_S
    assert "store.unreachable" in one.log_text
    assert "no server listens at this address: check host and port in --redis-url" in one.log_text
    assert "wrong-horse" not in one.log_text


def test_a_redis_url_that_cannot_be_read_exits_2_without_showing_its_password(tmp_path: Path) -> None:
    one = Service(tmp_path, handlers("Noop"), procs=1, redis_url="http://:wrong-horse@127.0.0.1:1/0")
    assert end_of(one) == 2
    assert "cannot be read as a Redis URL" in one.log_text
    assert "wrong-horse" not in one.log_text


def test_closed_standard_streams_do_not_stop_the_service(tmp_path: Path) -> None:
    one = Service(tmp_path, handlers("Noop"), procs=1)
    with ending(one):
        one.launch(redirections="<&- >&- 2>&-")
        eventually(lambda: (one.data_dir / "endpoints.json").exists())
        one.wait_for_end(one.enqueue("noop"))
        assert one.terminate() == 0
        one.assert_nothing_left()


def test_children_import_nothing_from_the_current_folder_but_handlers(tmp_path: Path) -> None:
    one = Service(tmp_path, {"own": "own_jobs:Own"}, procs=1)
    trace = tmp_path / "imported"
    for name in ("setproctitle", "redis", "msgspec", "click"):
        (one.cwd / f"{name}.py").write_text(f"open({str(trace)!r}, 'a').write('{name} ')\n")
    (one.cwd / "own_jobs.py").write_text("class Own:\n    def handle(self, job):\n        pass\n")
    with ending(one):
        one.start()
        one.enqueue("own")
        one.wait_until_drained()
        assert one.terminate() == 0
    assert not trace.exists(), trace.read_text()


def test_services_beside_each_other_need_only_folders_of_their_own(tmp_path: Path) -> None:
    both = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        both.append(Service(tmp_path / name, handlers("Noop"), procs=1, data_dir=Path("own")))
    with ending(both[0]), ending(both[1]):
        for one in both:
            one.launch()
        for one in both:
            one.wait_until_ready()
        assert [one.terminate() for one in both] == [0, 0]


#: Of a data directory.
ODD_NAME = "with blank, a'b\"c\\d 小说 #hash %s $HOME [x]*"


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("running")
    with service(folder, handlers("Noop"), procs=1, valkey_port=port, data_dir=folder / ODD_NAME) as running:
        yield running


def test_the_embedded_valkey_listens_on_the_port_that_was_given(one: Service, port: int) -> None:
    assert one.redis_url.endswith(f"@127.0.0.1:{port}/0")
    one.wait_for_end(one.enqueue("noop"))


def test_a_data_directory_may_have_any_name(one: Service) -> None:
    one.wait_for_end(one.enqueue("noop"))
    assert one.data_dir.name == ODD_NAME
    assert list((one.data_dir / "valkey").glob("appendonlydir/*.incr.aof"))


def test_where_memory_is_short_the_kernel_takes_a_worker_first(one: Service) -> None:
    scores = {role: int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for role, pid in one.roles().items()}
    assert scores.pop("worker 0") == 500
    assert set(scores) == {"supervisor", "forkserver", "guard", "reader", "reaper", "valkey"}
    assert max(scores.values()) < 500


def test_a_data_directory_in_use_is_refused_with_the_holders_pid(tmp_path: Path, one: Service) -> None:
    second = Service(tmp_path, handlers("Noop"), procs=1, data_dir=one.data_dir)
    assert end_of(second) == 2
    (refusal,) = [event["error"] for event in second.log() if "error" in event]
    assert str(one.data_dir) in refusal
    assert f"pid {one.pid}" in refusal
    assert one.is_ready(), "the first one is not disturbed"
    one.wait_for_end(one.enqueue("noop"))
