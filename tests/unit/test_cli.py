"""``jobworker`` before any store is asked: it starts at once, every verb teaches, completion works."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from jobworker.supervisor import main as supervise
from jobworker.worker.admin.words import format_duration
from jobworker.worker.cli import main
from jobworker.worker.cli.common import Age

COMMAND = Path(sys.executable).parent / "jobworker"
#: What the answer to `--help` may cost; processor time, for a busy machine says nothing about us.
HELP_CPU_S = 0.3


def verbs(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, *path, name)
        else:
            yield (*path, name), command


ALL = dict(verbs(main))
#: Those that ask and answer; `web` stays.
ASKING = [path for path in ALL if path != ("web",)]


def test_the_agreed_verbs_are_there() -> None:
    agreed = "enqueue|stats|top|dlq list|dlq show|dlq requeue|dlq purge|retry list|retry now|explain|doctor"
    assert {" ".join(path) for path in ALL} >= {*agreed.split("|"), "pause", "resume"}


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_verb_teaches_by_an_example_and_speaks_json(path: tuple[str, ...]) -> None:
    text = CliRunner().invoke(main, [*path, "--help"]).output
    assert f"jobworker {' '.join(path)}" in text.partition("Options:")[0].partition("\n\n")[2], "an example"
    wanted = {"--redis-url", "JOBWORKER_REDIS_URL", *(["--json"] if path in ASKING else [])}
    assert wanted <= {*text.replace("]", " ").split()}


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_without_a_deployment_it_says_how_to_name_one(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    needs = {"enqueue": ["audit"], "explain": ["x"], "show": ["x"], "resume": ["x"]}
    result = CliRunner().invoke(main, [*path, *needs.get(path[-1], [])], env={"JOBWORKER_REDIS_URL": None})
    assert result.exit_code == 2
    assert "JOBWORKER_REDIS_URL" in result.output


class TestTheServicesOwnFile:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "jobworker.toml"
        file.write_text('redis-url = "redis://127.0.0.1:1/0"\nprocs = 3\nstream = ["a=b"]\n')
        return file

    @pytest.mark.parametrize("path", ASKING, ids=" ".join)
    def test_says_which_deployment(self, path: tuple[str, ...], file: Path) -> None:
        needs = {"enqueue": ["audit"], "explain": ["x"], "show": ["x"], "resume": ["x"],
                 "now": ["--all"], "requeue": ["--all"], "purge": ["--all", "--yes"]}  # fmt: skip
        command = [*path, *needs.get(path[-1], [])]
        for given, environment in (["--config", str(file)], {}), ([], {"JOBWORKER_CONFIG": str(file)}):
            result = CliRunner().invoke(main, [*command, *given], env=environment)
            assert "127.0.0.1:1" in result.output, "asked there, in vain"
            assert result.exit_code == (1 if path == ("doctor",) else 5)

    def test_says_which_streams(self, file: Path) -> None:
        result = CliRunner().invoke(main, ["doctor", "--config", str(file), "--stream", "no-group"])
        assert (result.exit_code, "NAME=GROUP" in result.output) == (2, True), "the command line wins"
        file.write_text('redis-url = "redis://127.0.0.1:1/0"\nstream = ["no-group"]\n')
        result = CliRunner().invoke(main, ["doctor", "--config", str(file)])
        assert (result.exit_code, "NAME=GROUP" in result.output) == (2, True)

    def test_does_not_say_where_to_enqueue_or_how_long_a_job_may_take(self, file: Path) -> None:
        file.write_text('redis-url = "redis://127.0.0.1:1/0"\njob-timeout = 5\nstream = ["no-group"]\n')
        assert CliRunner().invoke(main, ["enqueue", "audit", "--config", str(file)]).exit_code == 5

    @pytest.mark.parametrize("text", ["no toml", "redis_url = 'x'\n", "colour = 'red'\n"])
    def test_is_refused_where_it_is_none(self, text: str, file: Path) -> None:
        file.write_text(text)
        result = CliRunner().invoke(main, ["stats", "--config", str(file)])
        assert (result.exit_code, str(file) in result.output.replace("\n", "")) == (2, True)


@pytest.mark.parametrize("command", [main, supervise])
def test_both_commands_say_which_version_they_are(command: click.Command) -> None:
    assert version("jobworker") in CliRunner().invoke(command, ["--version"]).output


def test_help_is_there_at_once() -> None:
    def cost_s() -> float:
        with subprocess.Popen([str(COMMAND), "--help"], stdout=subprocess.DEVNULL) as one:
            _, status, usage = os.wait4(one.pid, 0)
            one.returncode = os.waitstatus_to_exitcode(status)
        assert one.returncode == 0
        return usage.ru_utime + usage.ru_stime

    assert min(cost_s() for _ in range(3)) < HELP_CPU_S


def test_help_loads_no_client_of_any_store() -> None:
    heavy = {"redis", "torch", "pymilvus"}
    code = f"import sys, jobworker.worker.cli; print(*sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []


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
def test_completion_knows_what_may_stand_there(typed: str, wanted: str) -> None:
    *words, last = typed.split()
    found = ShellComplete(main, {}, "jobworker", "_JOBWORKER_COMPLETE").get_completions(words, last)
    assert [item.value for item in found] == [wanted]


def test_the_command_without_a_verb_says_what_there_is_and_each_on_one_line() -> None:
    for arguments in ([], ["dlq"], ["retry"]):
        listed = (
            CliRunner().invoke(main, [*arguments, "--help"]).output.partition("Commands:")[2].splitlines()
        )
        assert [line for line in listed if line.endswith("...") and "web" not in line] == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("7d", 604800), ("1w", 604800)]
)
def test_ages(text: str, seconds: float) -> None:
    assert Age().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1", "1y", "2 h", "inf"])
def test_what_is_no_age_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Age().convert(text, None, None)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (12.4, "12 s"), (200, "3 min"), (7300, "2 h"), (1e6, "12 d")]
)
def test_spans(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
