"""Who may import whom, held over the syntax trees: imports point down, one library has one door."""

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: A library and the only files that may import it; all the rest speaks to those files.
DOORS = {
    "redis": ["worker/redis_*.py"],
    "valkey": [],
    "prometheus_client": ["worker/metrics.py"],
    "opentelemetry": ["worker/otel.py", "worker/otel_context.py"],
    "starlette": ["worker/web/*.py"],
    "uvicorn": ["worker/web/serve.py"],
    "jinja2": ["worker/web/rendering.py"],
    "pymilvus": ["handlers/vectors.py", "handlers/milvus_*.py"],
    "milvus_lite": ["handlers/lite_server.py"],
    "torch": ["handlers/encoder.py", "handlers/torch_*.py"],
    "sentence_transformers": ["handlers/encoder.py", "handlers/torch_*.py"],
    "transformers": ["handlers/encoder.py", "handlers/torch_*.py"],
}

ROLES = {"worker.reader", "worker.reaper", "worker.runner"}
ADAPTERS = ["worker.redis_*", "worker.memory_*", "worker.metrics", "worker.otel*"]
PORTS = {"worker.handler", "worker.store", "worker.ring", "worker.channel"}
#: Decisions without input or output: they import each other, the standard library and msgspec.
PURE = {
    *("worker." + name for name in ("envelope", "outcome", "backoff", "keys", "settings", "errors")),
    *("handlers." + name for name in ("packing", "segmenter")),
}
#: Composition: these put the adapters and roles together, so no role or port may look back up at them.
COMPOSERS = {"worker.boot", "worker.process", "worker.embedded", "worker.testing", "supervisor"}
#: The root folder's names; imported bare they would find another project's, or nothing once installed.
ROOMS = {"worker", "handlers", "supervisor"}


def imports(path: str, source: str) -> Iterator[str]:
    """Dotted names that a file imports; those of this project without the leading ``jobworker.``.

    ``from x import y`` gives ``x`` and ``x.y``, since ``y`` may be a module. ``bare:x`` marks a room of
    ours that was imported without the project's name.
    """
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*(["jobworker", *base] if node.level else []), *filter(None, [node.module])])
            found = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in found:
            head, _, rest = name.partition(".")
            yield f"bare:{name}" if head in ROOMS else rest if head == "jobworker" and rest else name


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def inside(name: str, module: str) -> bool:
    """Whether ``name`` is ``module`` or something in it."""
    return name == module or name.startswith(module + ".")


def within(name: str, modules: set[str]) -> bool:
    return any(inside(name, module) for module in modules)


def breaks(module: str, path: str, name: str) -> str | None:
    """The rule that ``path`` breaks by importing ``name``, or None."""
    room = module.partition(".")[0]
    ours = name.partition(".")[0] in ROOMS
    library = name.partition(".")[0]
    rules = {
        "import it as jobworker.…": name.startswith("bare:"),
        f"only {DOORS.get(library)} may": library in DOORS and not matches(path, DOORS[library]),
        "nothing imports the supervisor": inside(name, "supervisor") and module != "supervisor",
        "handlers are named by strings only": room != "handlers" and reaches_into(name, "handlers"),
        "the worker knows no handler": room == "worker" and inside(name, "handlers"),
        "handlers see jobworker.worker's own names only": room == "handlers" and reaches_into(name, "worker"),
        "a role never imports a role": module in ROLES and within(name, ROLES - {module}),
        "roles and ports know no adapter": module in ROLES | PORTS and matches(name, ADAPTERS),
        "imports point down": module in ROLES | PORTS | PURE and within(name, COMPOSERS),
        "ports know no role": module in PORTS and within(name, ROLES),
        "pure files import pure files": module in PURE and ours and not pure_name(name),
        "pure files import no library but msgspec": module in PURE and not ours and third_party(library),
    }
    return next((rule for rule, broken in rules.items() if broken), None)


def reaches_into(name: str, room: str) -> bool:
    """``room.x`` where x is a file: names that the room's ``__init__.py`` offers are no files."""
    parts = name.split(".")
    return parts[0] == room and len(parts) > 1 and (ROOT / room / f"{parts[1]}.py").exists()


def pure_name(name: str) -> bool:
    return within(name, PURE) or name in {"worker", "handlers"}


def third_party(library: str) -> bool:
    return library not in sys.stdlib_module_names and library not in {"msgspec", "jobworker"}


def violations(path: str, source: str) -> list[str]:
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = sorted(set(imports(path, source)))
    return [f"{path} imports {name}: {rule}" for name in found if (rule := breaks(module, path, name))]


def test_imports_point_down() -> None:
    files = [*ROOT.glob("*.py"), *ROOT.glob("worker/**/*.py"), *ROOT.glob("handlers/**/*.py")]
    assert len(files) > 10, "the files are not where this test looks"
    wrong = [line for f in files for line in violations(f.relative_to(ROOT).as_posix(), f.read_text("utf-8"))]
    assert not wrong, "\n".join(wrong)


def test_rooms_are_imported_by_the_projects_name() -> None:
    for file in [f for room in ("tests", "bench", "samples") for f in (ROOT / room).rglob("*.py")]:
        bare = [
            n for n in imports(file.relative_to(ROOT).as_posix(), file.read_text("utf-8")) if "bare:" in n
        ]
        assert not bare, f"{file} imports {bare}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("worker/reader.py", "import jobworker.handlers.embed"),
        ("worker/boot.py", "from jobworker import handlers"),
        ("worker/reader.py", "from .reaper import Reaper"),
        ("worker/runner.py", "from jobworker.worker import reader"),
        ("worker/reader.py", "from .redis_store import RedisStore"),
        ("worker/reader.py", "def f():\n    import redis.asyncio"),
        ("worker/cli/stats.py", "import redis"),
        ("worker/store.py", "from .boot import run"),
        ("worker/boot.py", "from jobworker.supervisor import main"),
        ("worker/keys.py", "from . import reader"),
        ("worker/backoff.py", "import numpy"),
        ("worker/health.py", "from prometheus_client import Counter"),
        ("handlers/embed.py", "from jobworker.worker.errors import PermanentError"),
        ("handlers/embed.py", "import torch"),
        ("handlers/embed.py", "from pymilvus import MilvusClient"),
        ("handlers/packing.py", "from .vectors import open_vectors"),
        ("supervisor.py", "import worker.boot"),
        ("supervisor.py", "from jobworker.handlers.vectors import open_vectors"),
    ],
)
def test_a_planted_violation_is_seen(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("worker/boot.py", "from .redis_store import RedisStore\nfrom .reader import Reader"),
        ("worker/redis_store.py", "import redis"),
        ("worker/settings.py", "import msgspec\nfrom .keys import Source"),
        ("handlers/embed.py", "from jobworker.worker import Job, PermanentError\nfrom . import packing"),
        ("supervisor.py", "import click\nfrom jobworker.worker.process import Child"),
        ("supervisor.py", "from jobworker.handlers import BUILTIN"),
    ],
)
def test_what_is_allowed_is_left_alone(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize("module", ["jobworker.supervisor", "jobworker.handlers", "jobworker.worker.cli"])
def test_import_loads_nothing_heavy(module: str) -> None:
    """The supervisor must restart children at once, and own no thread that a child could inherit."""
    heavy = {"torch", "sentence_transformers", "pymilvus", "numpy", "milvus_lite"}
    if module == "jobworker.supervisor":
        heavy.add("redis")
    code = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
