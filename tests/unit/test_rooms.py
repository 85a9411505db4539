"""Folders and import directions, read from the syntax trees: imports point down, one library has one door."""

import ast
import fnmatch
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import jobworker.worker

ROOT = Path(__file__).resolve().parents[2]

#: A library and the only files that may import it; all other files call those files.
DOORS = {
    "redis": ["worker/store/redis/*.py"],
    "valkey": [],
    "prometheus_client": ["worker/telemetry/prometheus.py"],
    "opentelemetry": ["worker/telemetry/otel.py", "worker/telemetry/otel_context.py"],
    "pydantic": ["worker/functions/payload_types.py"],
    "starlette": ["worker/web/*.py", "handlers/api/*.py"],
    "uvicorn": ["worker/http/server.py"],
    "jinja2": ["worker/web/rendering.py"],
    "pymilvus": ["handlers/vectors/milvus/*.py", "handlers/rebuild/milvus.py"],
    "milvus_lite": ["handlers/vectors/milvus/lite_server.py"],
    "cronsim": ["worker/cron/schedule.py"],
    "torch": [
        "handlers/encoder/base.py",
        "handlers/encoder/torch.py",
        "handlers/encoder/packed_bert.py",
        "handlers/encoder/sparse_head.py",
        "handlers/encoder/convert.py",
    ],
    "sentence_transformers": ["handlers/encoder/torch.py", "handlers/encoder/convert.py"],
    "transformers": ["handlers/encoder/torch.py", "handlers/encoder/convert.py"],
}

#: Each room and the rooms that it may import. A file directly under worker/ is a room of its own.
CORE = {
    *("errors", "keys", "settings", "devices", "envelope", "outcome", "event_loop", "handler", "options"),
    *("extension", "safe_text", "urls", "store_advice", "flow", "conditions", "results", "new_job"),
    *("config", "cron", "functions", "host", "http", "shards"),
}
IPC = {*CORE, "telemetry", "ipc"}
ADMIN = {*CORE, "store", "telemetry", "producer", "cron.enqueuer", "batches"}
BELOW: dict[str, set[str]] = {
    **dict.fromkeys(CORE, CORE),
    # A counter of a handler must not have the name of a metric.
    "handler": {*CORE, "telemetry"},
    # A job carries the span of its producer.
    "new_job": {*CORE, "telemetry"},
    "http.server": set(),
    "api_role": IPC,
    "fork_guard": {"telemetry"},
    "event_loop": {*CORE, "fork_guard"},
    "store": CORE,
    "telemetry": CORE,
    "ipc": IPC,
    "cancel": {*CORE, "store"},
    "producer_batch": {*CORE, "store"},
    "producer": {*CORE, "store", "telemetry", "producer_batch", "cancel"},
    "scripted_redis": {"store"},
    "worker": {*CORE, "telemetry", "producer", "producer_batch"},
    "wakeups": set(),
    "reader": {*IPC, "store", "wakeups"},
    "health_check": {*CORE, "telemetry", "fork_guard"},
    "runner": {*IPC, "health_check", "fork_guard"},
    "cron.enqueuer": {*CORE, "store", "telemetry"},
    "batches": {*CORE, "store", "telemetry"},
    "cron.config": {*CORE, "store"},
    "config.tables": {*CORE, "cron.config"},
    "forwarding": {*CORE, "store", "telemetry"},
    "reaper": {*IPC, "store", "cron.enqueuer", "batches", "forwarding", "wakeups"},
    "supervision": IPC,
    "admin": {*CORE, "store", "telemetry", "producer", "cron.enqueuer", "batches"},
    "cli": {*ADMIN, "producer_batch", "admin", "cancel", "cli.web"},
    "web": {
        *CORE,
        "store",
        "telemetry",
        "producer",
        "cron.enqueuer",
        "batches",
        "admin",
        "cancel",
        "http.server",
    },
    "boot": {
        *(*IPC, "api_role", "store", "reader", "runner", "reaper", "supervision", "fork_guard"),
    },
    "preload": {*IPC, "store", "reader", "runner", "reaper", "supervision", "boot"},
    "testing": {*IPC, "store", "reader", "runner", "reaper", "producer", "admin", "cron.config", "batches"},
}
#: Command modules import their face when they are called: `jobworker web` starts the page.
BELOW["cli.web"] = {*BELOW["cli"], "cli", "web"}
JOB_TYPES = {"embedding", "rebuild", "summaries", "audit", "erasure"}
SHARED_BELOW = {
    "jobstore": set(),
    "vectors": {"jobstore", "graphemes", "sparse_vector"},
    "encoder": {"vectors", "file_lock", "graphemes", "sparse_vector"},
    "api": {"vectors", "encoder", "jobstore", "sparse_vector"},
    "book": {"vectors", "encoder", "doctor"},
}
#: What handlers may import of the engine besides the names in worker/__init__.py.
PUBLIC = {
    *("scripted_redis", "testing", "extension", "options", "urls", "safe_text", "cli", "api_role"),
    *("config", "host", "http"),
}
#: Roles and the reader know the store by its ports only; these compose adapters.
ADAPTERS = ("worker.store.redis", "worker.store.memory")
COMPOSERS = {"boot", "preload", "testing", "producer", "scripted_redis", "admin", "cli", "web"}
#: Decisions without input or output: they import each other, the standard library, msgspec and orjson.
PURE = {
    *("worker." + name for name in ("envelope", "outcome", "keys", "errors", "flow", "conditions", "shards")),
    *("handlers." + name for name in ("encoder.packing", "encoder.segmenter", "graphemes")),
}
#: The top level's names; imported bare they would find another project's, or nothing once installed.
ROOMS = {"worker", "handlers", "supervisor"}


def imports(path: str, source: str) -> Iterator[str]:
    """Dotted names that a file imports; those of this project without the leading ``jobworker.``.

    ``from x import y`` gives ``x`` and ``x.y``, since ``y`` may be a module. ``bare:x`` marks a top-level
    name of ours that was imported without the project's name.
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


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def engine_room(module: str) -> str:
    """The room of a module of worker/: a folder, or a file with rules of its own."""
    parts = module.split(".")
    file = ".".join(parts[1:3])
    return "worker" if len(parts) == 1 else file if file in BELOW else parts[1]


def points_up_in_worker(module: str, name: str) -> bool:
    own, other = engine_room(module), engine_room(name)
    allowed = BELOW.get(own, set())
    known = is_module(f"worker.{other}") or other == "worker"
    # `from .. import keys` names the package on the way to one of its files.
    return known and name != "worker" and other != own and other not in allowed


def points_up_in_handlers(module: str, name: str) -> bool:
    own, other = (one.split(".")[1] if "." in one else "" for one in (module, name))
    # The settings of all job types are one record below them.
    if other in ("", own, "settings") or not is_module(f"handlers.{other}"):
        return False
    if own in JOB_TYPES:
        return other in JOB_TYPES
    return other not in SHARED_BELOW.get(own, set())


def breaks(module: str, path: str, name: str) -> str | None:
    """The rule that ``path`` breaks by importing ``name``, or None."""
    room, target = module.partition(".")[0], name.partition(".")[0]
    ours = target in ROOMS
    rules = {
        "import it as jobworker.…": name.startswith("bare:"),
        f"only {DOORS.get(target)} may": target in DOORS and not matches(path, DOORS[target]),
        "nothing imports the supervisor": inside(name, "supervisor") and module != "supervisor",
        "handlers are named by strings only": room != "handlers" and reaches_into(name, "handlers"),
        "the worker knows no handler": room == "worker" and inside(name, "handlers"),
        "handlers see jobworker.worker's public names only": room == "handlers" and is_private(name),
        "imports point down": room == target == "worker" and points_up_in_worker(module, name),
        "job types do not import each other, nor the shared folders them": room == target == "handlers"
        and points_up_in_handlers(module, name),
        "roles know the store's ports, not its adapters": room == "worker"
        and name.startswith(ADAPTERS)
        and engine_room(module) not in {*COMPOSERS, "store"},
        "pure files import pure files": module in PURE and ours and not pure_name(name),
        "pure files import no library but JSON": module in PURE and not ours and third_party(target),
    }
    return next((rule for rule, broken in rules.items() if broken), None)


def reaches_into(name: str, room: str) -> bool:
    """``room.x`` where x is a module: names that the room's ``__init__.py`` offers are none."""
    parts = name.split(".")
    return parts[0] == room and len(parts) > 1 and is_module(f"{room}.{parts[1]}")


def is_private(name: str) -> bool:
    return reaches_into(name, "worker") and name.split(".")[1] not in PUBLIC


def pure_name(name: str) -> bool:
    return any(inside(name, module) for module in PURE) or name in {"worker", "handlers", "handlers.encoder"}


def third_party(library: str) -> bool:
    return library not in sys.stdlib_module_names and library not in {"msgspec", "orjson", "jobworker"}


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def violations(path: str, source: str) -> list[str]:
    found = sorted(set(imports(path, source)))
    return [
        f"{path} imports {name}: {rule}" for name in found if (rule := breaks(module_of(path), path, name))
    ]


def product_files() -> list[Path]:
    files = [*ROOT.glob("*.py"), *ROOT.glob("worker/**/*.py"), *ROOT.glob("handlers/**/*.py")]
    assert len(files) > 100, "the files are not where this test looks"
    return files


def test_imports_point_down() -> None:
    wrong = [
        line
        for file in product_files()
        for line in violations(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """One import circle, module by module; empty where there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return [str(module) for module in error.args[1]]
    return []


def test_no_import_circle() -> None:
    """Imports inside functions count too: a circle of files is one idea in two places."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for file in product_files():
        path = file.relative_to(ROOT).as_posix()
        module = module_of(path)
        for name in imports(path, file.read_text("utf-8")):
            # A package's own name is only the way to one of its modules.
            if is_module(name) and name != module and not inside(module, name):
                arrows[module].add(name)
    assert circle(arrows) == []


def test_a_planted_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert circle({"a": {"b"}, "b": {"c"}}) == []


def class_names(source: str) -> list[str]:
    return [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]


def test_a_class_name_means_one_class() -> None:
    """A reader who searches for a class finds one."""
    homes = defaultdict(list)
    for file in product_files():
        for name in class_names(file.read_text("utf-8")):
            homes[name].append(file.relative_to(ROOT).as_posix())
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert not twice


def test_rooms_are_imported_by_the_projects_name() -> None:
    for file in [f for room in ("tests", "bench", "samples") for f in (ROOT / room).rglob("*.py")]:
        bare = [
            n for n in imports(file.relative_to(ROOT).as_posix(), file.read_text("utf-8")) if "bare:" in n
        ]
        assert not bare, f"{file} imports {bare}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("worker/reader/reader.py", "import jobworker.handlers.embedding"),
        ("worker/boot.py", "from jobworker import handlers"),
        ("worker/reader/reader.py", "from ..reaper import Reaper"),
        ("worker/runner.py", "from jobworker.worker import reader"),
        ("worker/reader/reader.py", "from ..store.redis.reader import RedisReaderStore"),
        ("worker/reader/reader.py", "def f():\n    import redis.asyncio"),
        ("worker/cli/stats.py", "import redis"),
        ("worker/cli/stats.py", "from ..web.pages import Pages"),
        ("worker/web/pages.py", "from ..cli.common import Deployment"),
        ("worker/store/ports.py", "from ..boot import run"),
        ("worker/store/redis/server_facts.py", "from ...admin.doctor import Finding"),
        ("worker/telemetry/trace.py", "from ..reader.admission import AdmittedJob"),
        ("worker/ipc/ring.py", "from ..reader import dispatch"),
        ("worker/boot.py", "from jobworker.supervisor import main"),
        ("worker/keys.py", "from . import reader"),
        ("worker/outcome.py", "import numpy"),
        ("worker/supervision/health.py", "from prometheus_client import Counter"),
        ("handlers/embedding/handler.py", "from jobworker.worker.errors import PermanentError"),
        ("handlers/embedding/handler.py", "import torch"),
        ("handlers/embedding/handler.py", "from pymilvus import MilvusClient"),
        ("handlers/embedding/handler.py", "from ..rebuild.handler import IndexRebuild"),
        ("handlers/vectors/ports.py", "from ..embedding.payload import EmbedPayload"),
        ("handlers/encoder/packing.py", "from ..vectors.ports import Row"),
        ("handlers/jobstore/fence.py", "from ..vectors.ports import Row"),
        ("supervisor.py", "import worker.boot"),
        ("supervisor.py", "from jobworker.handlers.vectors.ports import Row"),
    ],
)
def test_a_planted_violation_is_seen(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "worker/boot.py",
            "from .store.redis.reader import RedisReaderStore\nfrom .reader.reader import Reader",
        ),
        ("worker/store/redis/reaper.py", "import redis"),
        ("worker/settings.py", "import msgspec\nfrom .keys import Source"),
        ("handlers/embedding/handler.py", "from jobworker.worker import Job\nfrom ..encoder import packing"),
        ("handlers/jobstore/redis_fence.py", "from jobworker.worker.scripted_redis import ScriptedRedis"),
        ("supervisor.py", "import click\nfrom jobworker.worker.supervision.process import Child"),
        ("supervisor.py", "from jobworker.handlers import BUILTIN"),
    ],
)
def test_what_is_allowed_is_left_alone(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_public_names_are_found_when_they_are_used() -> None:
    """They are imported late, so a wrong entry of the table would be noticed by users first."""
    use = "from jobworker.worker import *; import jobworker.worker as w"
    code = f"{use}; print(*set(w.__all__) ^ w._MODULES.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
    with pytest.raises(AttributeError, match="'Prodcuer'"):
        getattr(jobworker.worker, "Prodcuer")  # noqa: B009


@pytest.mark.parametrize("module", ["jobworker.supervisor", "jobworker.handlers", "jobworker.worker.cli"])
def test_import_loads_nothing_heavy(module: str) -> None:
    """The supervisor must restart children at once, and own no thread that a child could inherit."""
    heavy = {"torch", "sentence_transformers", "pymilvus", "numpy", "milvus_lite"}
    if module == "jobworker.supervisor":
        heavy |= {"redis", "jobworker.worker.producer", "jobworker.worker.handler"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
