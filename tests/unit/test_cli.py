"""Command line ``jobworker`` without a store: fast start, examples, configuration file, completion."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from jobworker.supervisor import main as supervise
from jobworker.worker.admin.dead_letters import read_letter
from jobworker.worker.cli import main
from jobworker.worker.cli.common import Age, confirm, echo_json
from jobworker.worker.cli.dlq import _to_json as letter_fields
from jobworker.worker.envelope import read_header
from jobworker.worker.errors import ConfigurationError
from jobworker.worker.producer import Producer
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.store.ports import Entry

COMMAND = Path(sys.executable).parent / "jobworker"
#: Most modules that `--help` may load, Python's own among them: each costs time at every call.
HELP_MODULES = 350


def verbs(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, *path, name)
        else:
            yield (*path, name), command


ALL = dict(verbs(main))
#: The verbs that print an answer and end; `web` keeps running.
ONE_SHOT = [path for path in ALL if path != ("web",)]
#: Writes JSON lines in any case.
JSON_LINES = (("export",),)
#: Asks the API of a service instead of the job store.
SEARCH = ("search",)
OF_THE_STORE = [path for path in ALL if path != SEARCH]
_SCOPE = ["--tenant", "x", "--project", "x"]
BOOK = {"import": [os.devnull, *_SCOPE], "export": _SCOPE}


def test_all_agreed_verbs_exist() -> None:
    agreed = "enqueue|stats|top|dlq list|dlq show|dlq requeue|dlq purge|retry list|retry now|explain|doctor"
    assert {" ".join(path) for path in ALL} >= {*agreed.split("|"), "pause", "resume"}


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_verb_has_an_example_and_json_output(path: tuple[str, ...]) -> None:
    text = CliRunner().invoke(main, [*path, "--help"]).output
    assert f"jobworker {' '.join(path)}" in text.partition("Options:")[0].partition("\n\n")[2], "an example"
    named = (
        {"--serve-url", "JOBWORKER_SERVE_URL"} if path == SEARCH else {"--redis-url", "JOBWORKER_REDIS_URL"}
    )
    wanted = named | ({"--json"} if path in ONE_SHOT and path not in JSON_LINES else set())
    assert wanted <= {*text.replace("]", " ").split()}


@pytest.mark.parametrize("path", OF_THE_STORE, ids=" ".join)
def test_without_a_deployment_the_error_says_how_to_name_one(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    needs = {"enqueue": ["audit"], "explain": ["x"], "cancel": ["x"], "result": ["x"],
             "show": ["x"], "resume": ["x"], "run": ["x"],
             "pause": ["x"], "set": ["x", "--concurrency=1"], "clear": ["x"], **BOOK}  # fmt: skip
    command = [*path, *(["x", "3"] if path == ("weight", "set") else needs.get(path[-1], []))]
    result = CliRunner().invoke(main, command, env={"JOBWORKER_REDIS_URL": None})
    assert result.exit_code == 2
    assert ("JOBWORKER_MILVUS_URI" if path == ("export",) else "JOBWORKER_REDIS_URL") in result.output


def test_export_and_erase_find_the_milvus_of_a_service_with_a_store_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "endpoints.json").write_text(
        '{"redis_url": "redis://127.0.0.1:1/0", "milvus_uri": "http://127.0.0.1:2"}'
    )
    for words in (["export", *_SCOPE], ["erase", "--tenant=x", "--dry-run"]):
        words = [*words, "--data-dir", str(tmp_path), "--redis-url"]
        assert CliRunner().invoke(main, [*words, "redis://127.0.0.1:1/0"]).exit_code == 1
        other = CliRunner().invoke(main, [*words, "redis://127.0.0.1:3/0"])
        assert (other.exit_code, "JOBWORKER_MILVUS_URI" in other.output) == (2, True)


class TestConfigurationFileOfTheService:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "jobworker.toml"
        file.write_text('redis-url = "redis://127.0.0.1:1/0"\nprocs = 3\nstream = ["a=b"]\n')
        return file

    # `export` asks for the vectors first, which the file does not name.
    @pytest.mark.parametrize("path", [p for p in ONE_SHOT if p not in (SEARCH, ("export",))], ids=" ".join)
    def test_it_names_the_deployment(self, path: tuple[str, ...], file: Path) -> None:
        needs = {"enqueue": ["audit"], "explain": ["x"], "show": ["x"], "resume": ["x"],
                 "run": ["x"], "pause": ["x"], "set": ["x", "--concurrency=1"], "clear": ["x"],
                 "now": ["--all"], "requeue": ["--all"], "erase": ["--tenant", "x", "--yes"],
                 "purge": ["--all", "--yes"], "cancel": ["x"], "result": ["x"], **BOOK}  # fmt: skip
        command = [*path, *(["x", "3"] if path == ("weight", "set") else needs.get(path[-1], []))]
        for given, environment in (["--config", str(file)], {}), ([], {"JOBWORKER_CONFIG": str(file)}):
            result = CliRunner().invoke(main, [*command, *given], env=environment)
            assert "127.0.0.1:1" in result.output, "it tried the store of the file"
            assert result.exit_code == {"doctor": 1, "url": 0}.get(path[-1], 5)

    def test_it_names_the_api(self, file: Path) -> None:
        file.write_text('serve-addr = "127.0.0.1:1"\n')
        words = ["search", "x", "--tenant=t", "--project=p", "--config", str(file)]
        result = CliRunner().invoke(main, words)
        assert (result.exit_code, "http://127.0.0.1:1" in result.output) == (1, True)

    def test_it_names_the_streams(self, file: Path) -> None:
        result = CliRunner().invoke(main, ["doctor", "--config", str(file), "--stream", "=no-name"])
        assert (result.exit_code, "NAME=GROUP" in result.output) == (2, True), "the command line wins"
        file.write_text('redis-url = "redis://127.0.0.1:1/0"\nstream = ["=no-name"]\n')
        result = CliRunner().invoke(main, ["doctor", "--config", str(file)])
        assert (result.exit_code, "NAME=GROUP" in result.output) == (2, True)

    def test_its_stream_and_job_timeout_do_not_apply_to_enqueue(self, file: Path) -> None:
        file.write_text('redis-url = "redis://127.0.0.1:1/0"\njob-timeout = 5\nstream = ["no-group"]\n')
        assert CliRunner().invoke(main, ["enqueue", "audit", "--config", str(file)]).exit_code == 5

    @pytest.mark.parametrize("text", ["no toml", "redis_uri = 'x'\n", "colour = 'red'\n"])
    def test_an_invalid_file_is_refused(self, text: str, file: Path) -> None:
        file.write_text(text)
        result = CliRunner().invoke(main, ["stats", "--config", str(file)])
        assert (result.exit_code, str(file) in result.output.replace("\n", "")) == (2, True)


@pytest.mark.parametrize("command", [main, supervise])
def test_both_commands_print_their_version(command: click.Command) -> None:
    assert version("jobworker") in CliRunner().invoke(command, ["--version"]).output


def test_help_loads_few_modules_and_no_heavy_library() -> None:
    heavy = {"redis", "torch", "pymilvus", "numpy", "asyncio", "ssl", "jinja2", "prometheus_client"}
    code = (
        f"import sys, jobworker.worker.cli; print(len(sys.modules), *sorted({heavy!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    number, *loaded = done.stdout.split()
    assert loaded == []
    assert int(number) <= HELP_MODULES


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_shells(shell: str) -> None:
    environment = {**os.environ, "_JOBWORKER_COMPLETE": f"{shell}_source"}
    done = subprocess.run([COMMAND], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "jobworker" in done.stdout, done.stderr


def test_completion_knows_the_verbs() -> None:
    environment = {**os.environ, "_JOBWORKER_COMPLETE": "bash_complete", "COMP_WORDS": "jobworker dlq re",
                   "COMP_CWORD": "2"}  # fmt: skip
    done = subprocess.run([COMMAND], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "plain,requeue" in done.stdout


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("dlq list --reason po", "poison"), ("enqueue emb", "embedding_batch"), ("pause au", "audit"),
        ("stats --stream stream:mem", "stream:memory:update"),
        ("enqueue --stream stream:a", "stream:audit:log"),
        ("retry now --type mem", "memory_update"),
    ],
)  # fmt: skip
def test_completion_offers_values_of_options_and_arguments(typed: str, wanted: str) -> None:
    *words, last = typed.split()
    found = ShellComplete(main, {}, "jobworker", "_JOBWORKER_COMPLETE").get_completions(words, last)
    assert [item.value for item in found] == [wanted]


def test_the_list_of_verbs_has_one_uncut_line_for_each() -> None:
    for arguments in ([], ["dlq"], ["retry"]):
        listed = (
            CliRunner().invoke(main, [*arguments, "--help"]).output.partition("Commands:")[2].splitlines()
        )
        assert [line for line in listed if line.endswith("...") and "web" not in line] == []


def test_an_age_is_an_option_in_seconds() -> None:
    assert Age().convert("15m", None, None) == 900.0
    assert Age().convert("1h30m", None, None) == 5400.0
    assert Age().convert("100w", None, None) == 60_480_000.0  # longer than any option of the service
    for text in ("soon", "-1"):
        with pytest.raises(click.BadParameter, match=r"is not a duration.*such as 30, 0\.5s"):
            Age().convert(text, None, None)


def test_an_empty_id_is_refused() -> None:
    """Each entry that cannot be read has the empty id."""
    done = CliRunner().invoke(main, ["explain", "", "--redis-url", "redis://127.0.0.1:1/0"])
    assert (done.exit_code, "the id is empty" in done.output) == (2, True)


@pytest.mark.parametrize("words", [["--help"], ["stats", "--help"], ["--version"]], ids=" ".join)
def test_an_output_that_takes_nothing_is_told_in_a_sentence(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (1, "jobworker: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["enqueue", "audit", "--payload", "-"], "--payload -: standard input is closed"),
        (["enqueue", "--lines", "-"], "--lines -: standard input is closed"),
        (["retry", "now", "--all"], "the job store did not answer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_closed_standard_input_is_told_in_a_sentence(words: list[str], told: str) -> None:
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", str(COMMAND), *words, "--redis-url", "redis://127.0.0.1:1/0"]
    done = subprocess.run(closed, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (2, 5)
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "line",
    ['{"stream":7}', '{"metadata":[1]}', '{"id":[]}', '{"tenant_id":{}}', '{"delay":"1"}', '{"type":7}'],
)
def test_a_line_of_the_wrong_kind_is_told_with_its_number(line: str) -> None:
    result = CliRunner().invoke(
        main, ["enqueue", "audit", "--lines", "-", "--redis-url", "redis://127.0.0.1:1/0"], input=line
    )
    assert (result.exit_code, "line 1: " in result.output) == (2, True), result.output


@pytest.mark.parametrize("timeout", ["48h", "0", "0.05", "-1"])
def test_a_timeout_that_a_service_would_change_is_refused(timeout: str) -> None:
    given = ["enqueue", "wc", "--redis-url", "redis://127.0.0.1:1"]
    result = CliRunner().invoke(main, [*given, "--timeout", timeout])
    assert result.exit_code == 2
    if timeout != "-1":
        assert "is not between 100ms and 1d" in result.stderr
    line = json.dumps({"timeout": 172_800})
    result = CliRunner().invoke(main, [*given, "--lines", "-"], input=line)
    assert (result.exit_code, "0.1 to 86,400 seconds" in result.stderr) == (2, True)


EXACT = '{"n":1234567890123456789.50,"big":1180591620717411303424,"none":null}'


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--payload", EXACT], ""),
        (["--payload", "-"], EXACT),
        (["--lines", "-"], f'{{"payload":{EXACT},"id":"a"}}'),
    ],
    ids=["argument", "standard input", "line"],
)
def test_a_payload_is_sent_with_every_digit(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = MemoryServer(time.time)
    monkeypatch.setattr(
        "jobworker.worker.cli.enqueue.Producer", lambda _: Producer(store=MemoryStore(server))
    )
    command = ["enqueue", "audit", *arguments, "--redis-url", "redis://127.0.0.1:1/0"]
    result = CliRunner().invoke(main, command, input=text)
    assert result.exit_code == 0, result.output
    (sent,) = server.entries("stream:audit:log").values()
    assert sent is not None
    assert bytes(read_header(sent).payload).decode() == EXACT


def test_a_dead_letter_is_printed_with_every_digit(capsys: pytest.CaptureFixture[str]) -> None:
    job = f'{{"id": "a", "type": "t",\n "payload": {EXACT}}}'
    letter = read_letter("s", Entry(b"1-0", f'{{"task": {job}, "retry_count": {10**30}}}'.encode()))
    for fields in (letter_fields(letter, True), letter_fields(replace(letter, retry_count=0), True)):
        echo_json({"dead_letters": [fields]})
    line, exact_line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["dead_letters"][0]["task"]["payload"]["big"] == 2**70
    assert f'"payload":{EXACT}}}' in exact_line


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        ("{\n  oops", "line 2 column 3"),
        ("NaN", "line 1 column 1"),
        ('["\\ud800"]', "surrogate"),
        ("1e999", "infinity"),
        ("", "empty"),
    ],
)
def test_a_payload_that_is_no_json_is_told_with_its_place(payload: str, told: str) -> None:
    for arguments, text in (
        (["--payload", payload], ""),
        (["--lines", "-"], payload.replace("\n", " ") or "["),
    ):
        command = ["enqueue", "audit", *arguments, "--redis-url", "redis://127.0.0.1:1/0"]
        result = CliRunner().invoke(main, command, input=text)
        assert result.exit_code == 2, result.output
        assert (told if arguments[0] == "--payload" else "line 1: not a JSON object") in result.output


def test_a_line_that_is_no_utf_8_is_told_with_its_place() -> None:
    command = ["enqueue", "audit", "--lines", "-", "--redis-url", "redis://127.0.0.1:1/0"]
    result = CliRunner().invoke(main, command, input=b'{"payload":"\xff"}')
    assert (result.exit_code, "line 1: " in result.output, "position 12" in result.output) == (2, True, True)


def test_a_payload_that_nests_too_deeply_is_told_in_a_sentence() -> None:
    command = ["enqueue", "audit", "--payload", "-", "--redis-url", "redis://127.0.0.1:1/0"]
    result = CliRunner().invoke(main, command, input="[" * 200_000)
    assert (result.exit_code, "nested too deeply" in result.output) == (2, True)


def test_a_deletion_that_cannot_be_confirmed_asks_for_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigurationError, match="give --yes"):
        confirm(lambda: "delete?", yes=False)


class TestUrl:
    """Addresses of a service on this machine."""

    @pytest.fixture
    def data_dir(self, tmp_path: Path) -> str:
        endpoints = {
            "redis_url": "redis://:secret-of-valkey@127.0.0.1:7/0",
            "milvus_uri": "http://root:secret-of-milvus@127.0.0.1:8",
            "metrics_url": "http://127.0.0.1:9", "pid": os.getpid(),
        }  # fmt: skip
        (tmp_path / "endpoints.json").write_text(json.dumps(endpoints))
        return str(tmp_path)

    def test_the_list_hides_passwords(self, data_dir: str) -> None:
        output = CliRunner().invoke(main, ["url", "--data-dir", data_dir]).output
        for address in ("redis://:***@127.0.0.1:7/0", "http://root:***@127.0.0.1:8", "http://127.0.0.1:9"):
            assert address in output
        assert "secret" not in output

    def test_one_address_is_complete(self, data_dir: str) -> None:
        result = CliRunner().invoke(main, ["url", "redis", "--data-dir", data_dir])
        assert result.output == "redis://:secret-of-valkey@127.0.0.1:7/0\n"
        found = json.loads(CliRunner().invoke(main, ["url", "--json", "--data-dir", data_dir]).output)
        assert found["milvus"] == "http://root:secret-of-milvus@127.0.0.1:8"

    def test_the_last_run_of_a_stopped_service_is_told(self, data_dir: str) -> None:
        file = Path(data_dir) / "endpoints.json"
        file.write_text(file.read_text().replace(str(os.getpid()), str(2**22 + 1)))
        result = CliRunner().invoke(main, ["url", "milvus", "--data-dir", data_dir])
        assert (result.exit_code, "its last run" in result.stderr) == (0, True)

    @pytest.mark.parametrize("verb", [["stats"], ["dlq", "list"], ["enqueue", "audit"]], ids=" ".join)
    def test_verbs_say_that_the_service_is_stopped_and_how_to_start_it(
        self, data_dir: str, verb: list[str]
    ) -> None:
        addresses = {"redis_url": "redis://127.0.0.1:1", "pid": 2**30}
        Path(data_dir, "endpoints.json").write_text(json.dumps(addresses))
        result = CliRunner().invoke(main, [*verb, "--data-dir", data_dir])
        assert result.exit_code == 5
        assert "is stopped" in result.stderr
        assert f"jobworker-supervise --data-dir {data_dir}" in result.stderr

    def test_an_address_that_is_not_known_is_told(self) -> None:
        result = CliRunner().invoke(main, ["url", "milvus", "--redis-url", "redis://127.0.0.1:1"])
        assert (result.exit_code, "the address of milvus is not known" in result.output) == (2, True)


#: Of each verb, one stream that it uses.
CLOSED = {"top": ">&-", "stats": ">&-", "enqueue audit": "<&-", "dlq requeue --all": "<&-", "pause": "2>&-",
          "web": "2>&-"}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "closed"), [*CLOSED.items(), *((verb, "<&- >&- 2>&-") for verb in CLOSED), ("top", "<&-")]
)
def test_closed_standard_streams_end_no_verb_with_a_traceback(verb: str, closed: str, tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = f"{COMMAND} {verb} --redis-url redis://127.0.0.1:1/0 --metrics-url http://127.0.0.1:1"
    if verb == "web":
        command += " --listen nowhere"
    if verb.split()[0] in ("enqueue", "dlq"):
        command = command.partition(" --metrics-url")[0]
    with told.open("w") as output:
        script = f"exec {command} {closed}"
        done = subprocess.run(["sh", "-c", script], stdout=output, stderr=output, timeout=60, check=False)
    assert done.returncode in (2, 5)
    assert "Traceback" not in told.read_text()
