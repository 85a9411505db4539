"""The documentation is correct: its examples run, its options exist, its links work."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import jobworker.worker
from jobworker.supervisor import main as service
from jobworker.worker import Job, Producer
from jobworker.worker.cli import main as tool
from jobworker.worker.cron.config import parse_cron_tables
from jobworker.worker.extension import extension
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.testing import Harness, Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Pages elsewhere, whose links and command lines have to be right too.
OTHERS = [ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
#: Pages that lead a maintainer to files and functions.
MAPS = [ROOT / "docs" / "architecture.md", ROOT / "docs" / "internals.md", ROOT / "CONTRIBUTING.md"]
#: A fenced block: its language (often none) and its text.
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: A command line of ours, behind its environment variables.
CALL = re.compile(r"\s*(?:[A-Z_]+=\S*\s+)*(jobworker(?:-supervise)?(?:\s.*|$))")


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


def block_with(page: str, text: str) -> str:
    (found,) = [block for block in blocks(ROOT / page, "python") if text in block]
    return found


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ours in the pages' blocks, in words, and the page that has it."""
    for page in [*PAGES, *OTHERS]:
        for text in [*blocks(page, ""), *blocks(page, "sh")]:
            for line in text.replace("\\\n", " ").splitlines():
                for part in re.split(r"\s(?:\||&&|>)\s", line.partition("  #")[0]):
                    if call := CALL.match(part):
                        yield page.name, shlex.split(call[1], comments=True)


def command_of(words: list[str]) -> click.Command:
    """The command or verb that these words call."""
    command: click.Command = service if words[0] == "jobworker-supervise" else tool
    for word in words[1:]:
        if not isinstance(command, click.Group):
            break
        if not word.startswith("-"):
            assert word in command.commands, f"no such verb: {' '.join(words)}"
            command = command.commands[word]
    return command


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> MemoryServer:
    """Where a `Producer` of an example puts its jobs."""
    server = MemoryServer()
    monkeypatch.setattr(jobworker.worker, "Producer", lambda url="": Producer(store=MemoryStore(server)))
    return server


def test_there_are_command_lines_to_look_at() -> None:
    assert len(list(commands())) > 20


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=lambda value: str(value)[:60])
def test_a_command_line_names_verbs_and_options_that_exist(page: str, words: list[str]) -> None:
    given = {word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1}
    assert given <= options_of(command_of(words)) | {"--help"}


def test_the_architecture_is_read_in_one_sitting() -> None:
    """What describes one feature belongs into internals.md."""
    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) <= 150


def test_every_option_of_the_service_is_documented() -> None:
    said = "\n".join(page.read_text() for page in PAGES)
    missing = [name for name in options_of(service) if not re.search(rf"`{name}\b", said)]
    assert not missing


@pytest.mark.parametrize(
    "text", [text for page in PAGES for text in blocks(page, "toml")], ids=lambda text: text.splitlines()[0]
)
def test_a_configuration_file_is_understood(text: str, tmp_path: Path) -> None:
    file = tmp_path / "jobworker.toml"
    file.write_text(text)
    parsed = service.make_context("jobworker-supervise", ["--config", str(file)]).params
    given = {name.replace("-", "_"): value for name, value in tomllib.loads(text).items()}
    assert given
    for name in ("limit", "weights"):  # no options
        given.pop(name, None)
    tables = parse_cron_tables(given.pop("cron", []), [source.stream for source in extension().streams])
    assert len(tables) == text.count("[[cron]]")
    assert {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in parsed.items()
        if name in given
    } == given


def test_every_verb_is_documented() -> None:
    said = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in tool.commands if not re.search(rf"`{name}\b|jobworker {name}\b", said)] == []


def test_the_readme_leads_to_every_page() -> None:
    said = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in said] == []


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.parent.name + "/" + page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_handler_of_the_readme_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, type] = {}
    exec(block_with("README.md", "class Shout"), names)
    with Harness({"shout": names["Shout"]}) as harness:
        harness.enqueue("shout", {"text": "hello"})
        harness.enqueue("shout", "no text")
        harness.run()
        assert capsys.readouterr().out == "HELLO!\n"
        assert [letter.reason for letter in harness.dead] == ["permanent"]


def test_the_test_of_the_page_on_cron_passes() -> None:
    names: dict[str, Any] = {}
    exec(block_with("docs/cron.md", "class Report"), names)
    names["test_a_report_each_night"]()


def test_the_test_of_the_page_on_batches_passes() -> None:
    names: dict[str, Any] = {}
    exec(block_with("docs/batches.md", "class ImportDone"), names)
    names["test_an_import_calls_back"]()


def test_the_idempotent_handler_writes_one_file_for_each_job_and_only_in_its_folder(tmp_path: Path) -> None:
    names: dict[str, type] = {}
    exec(block_with("docs/handlers.md", "class Save"), names)
    data = tmp_path / "data"
    with Harness({"save": names["Save"]}, Settings(data_dir=str(data))) as harness:
        for text in ("first", "second"):
            for id in ("../x", "/etc/x", "a\nb", "x" * 512, "plain"):
                harness.enqueue("save", text, id=id)
            harness.run()
        assert harness.dead == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {data / "saved"}
    assert [path.read_text() for path in files] == ["second"] * 5


def test_the_function_of_the_readme_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(block_with("README.md", "@job("), names)
    with Harness([names["shout"]]) as harness:
        harness.enqueue("shout", {"text": "hello"})
        harness.enqueue("shout", {"text": 5})
        harness.run()
        assert capsys.readouterr().out == "HELLO\n"
        assert [(letter.reason, "$.payload.text" in letter.error) for letter in harness.dead] == [
            ("malformed", True)
        ]


def test_the_handler_and_the_tests_of_the_page_on_handlers_run(tmp_path: Path) -> None:
    for text in blocks(ROOT / "docs" / "handlers.md", "python"):
        (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "7 passed" in done.stdout


def test_the_producers_of_the_pages_send_jobs(server: MemoryServer) -> None:
    exec(block_with("README.md", "Producer("), {})
    payload = {"tenant_id": "t001", "project_id": "p123", "ids": ["s1"], "texts": ["It rained."]}
    exec(block_with("docs/producers.md", "enqueue_many("), {"payload": payload})
    assert len(server.entries("stream:story:gen")) == 7
    exec(block_with("docs/producers.md", "supersede_key"), {"payload": payload})
    (saved,) = server.entries("stream:memory:update").values()
    assert json.loads(saved or b"")["metadata"].keys() == {"supersede_key", "not_before"}


def test_the_sink_of_the_page_on_summaries_is_a_class() -> None:
    names: dict[str, type] = {}
    exec(block_with("docs/summaries.md", "class Mine"), names)
    assert callable(names["Mine"]().store)


def test_the_page_on_handlers_names_every_field_of_a_job() -> None:
    said = (ROOT / "docs" / "handlers.md").read_text()
    (listed,) = re.findall(r"`Job` has `([^`]+)`", said)
    assert tuple(listed.split(", ")) == Job.__struct_fields__


def names_in_code() -> set[str]:
    """Every class, function, method and constant of the product, and ``Class.method``."""
    found: set[str] = set()
    for file in [*ROOT.glob("worker/**/*.py"), *ROOT.glob("handlers/**/*.py"), ROOT / "supervisor.py"]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                inside = [one for one in node.body if isinstance(one, ast.FunctionDef)]
                found |= {node.name, *(f"{node.name}.{one.name}" for one in inside)}
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {one.id for one in targets if isinstance(one, ast.Name)}
                found |= {one.attr for one in targets if isinstance(one, ast.Attribute)}
    return found


@pytest.mark.parametrize("page", MAPS, ids=lambda page: page.name)
def test_the_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    code = re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))
    files = [one for one in code if re.fullmatch(r"[\w./-]+\.(?:py|lua|md|cfg)|[\w/]+/", one)]
    everywhere = [path.as_posix() for room in ("worker", "handlers", "tests", "docs", "bench", "examples")
                  for path in (ROOT / room).rglob("*")]  # fmt: skip
    everywhere += [path.as_posix() for path in ROOT.iterdir()]
    missing = [one for one in files if not any(path.endswith("/" + one.rstrip("/")) for path in everywhere)]
    assert not missing
    names = [
        one for one in code if re.fullmatch(r"(?:[A-Z]\w*[a-z]\w*)(?:\.\w+)?|[a-z]+_[a-z_]+|_[a-z]+", one)
    ]
    known = names_in_code()
    assert not [one for one in names if one not in known and one != "Unavailable"]


#: How a level is called; `exception` logs an error with its traceback.
LEVELS = {"debug", "info", "warning", "error", "critical"}


def events_in_code() -> dict[str, str]:
    """Every log event of the product with its level."""
    found = {}
    for file in [*ROOT.glob("worker/**/*.py"), *ROOT.glob("handlers/**/*.py"), ROOT / "supervisor.py"]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and is_logger(node.func.value)
            ):
                level = node.func.attr.replace("exception", "error")
                if level in LEVELS:
                    (message, *_) = node.args
                    assert isinstance(message, ast.Constant), (
                        f"{file}:{node.lineno}: an event is a fixed text"
                    )
                    found[str(message.value).partition(" ")[0]] = level
    return found


def is_logger(node: ast.expr) -> bool:
    """Whether it is a module's logger, or one that was just looked up."""
    text = ast.unparse(node)
    return text in ("log", "logger") or text.startswith("logging.getLogger(")


def test_the_page_on_events_lists_every_event_with_its_level() -> None:
    listed = {}
    for names, level in re.findall(
        r"^\| (`[^|]+`) \| ([\w ]+) \|", (ROOT / "docs/events.md").read_text(), re.MULTILINE
    ):
        listed |= dict.fromkeys(re.findall(r"`([^`]+)`", names), level)
    assert listed.pop("log.suppressed") == "as the event"
    assert listed.pop("log.dropped") == "warning"
    assert listed == events_in_code()


def test_an_event_is_a_name_and_no_sentence() -> None:
    assert [name for name in events_in_code() if not re.fullmatch(r"[a-z_]+\.[a-z_]+", name)] == []
