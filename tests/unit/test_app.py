"""App modules: another process imports them and lists their handlers; mistakes are found at the start."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from jobworker.worker.errors import ConfigurationError
from jobworker.worker.functions.app import AppListing, app_handlers, checked_handlers, list_app, parse_app

HEAD = "from jobworker.worker import Job, JobHandler, job\n"
SHOUT = HEAD + "@job('shout')\ndef shout(payload: str) -> None: ...\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where modules of a test are found by the child."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    """Modules by name; ``a__b`` is b in the package a."""
    for name, text in files.items():
        path = folder / ("/".join(name.split("__", 1)) + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def errors_of(*apps: str, builtin: tuple[str, ...] = (), given: Mapping[str, str] | None = None) -> str:
    with pytest.raises(ConfigurationError) as raised:
        app_handlers(apps, builtin, given or {})
    return str(raised.value)


def test_functions_and_classes_of_a_module_are_found_and_nothing_is_imported_here(folder: Path) -> None:
    write(
        folder,
        helper_of_app="WORD = 'a'\n",
        app_one=HEAD
        + "import logging\nfrom logging import Handler\nimport helper_of_app\nfrom app_two import shared\n"
        "@job('shout', timeout=60)\ndef shout(payload: str) -> None: ...\n"
        "@job('quiet')\nasync def _quiet(payload: dict, job: Job) -> None: ...\n"
        "class Base(JobHandler):\n    pass\n"
        "class Greet(JobHandler):\n    job_type = 'greet'\n    def handle(self, job: Job) -> None: ...\n"
        "class Plain:\n    job_type = 'plain'\n    def handle(self, job): ...\n"
        "class _Hidden:\n    job_type = 'hidden'\n    def handle(self, job): ...\n"
        "class Log(logging.Handler): ...\n",
        app_two=HEAD + "@job('shared')\ndef shared(payload: int) -> None: ...\n",
    )
    listing = list_app(["app_one", "app_two"])
    assert sorted(listing.handlers) == [
        ("greet", "app_one:Greet"),
        ("plain", "app_one:Plain"),
        ("quiet", "app_one:_quiet"),
        ("shared", "app_two:shared"),
        ("shout", "app_one:shout"),
    ]
    assert (listing.errors, listing.untyped) == ([], [])
    names = ("app_one", "app_two", "helper_of_app")
    assert listing.files == [str(folder / f"{name}.py") for name in names]
    assert not {"app_one", "app_two", "helper_of_app"} & sys.modules.keys()


def test_modules_of_a_package_that_it_imports_are_part_of_it(folder: Path) -> None:
    write(
        folder,
        shop____init__="from . import mail\n",
        shop__mail=HEAD + "@job('mail')\ndef mail(payload: str) -> None: ...\n",
        shop__unused=SHOUT,
        factory=HEAD
        + "def make(name):\n    @job(name)\n    def run(payload: str) -> None: ...\n    return run\n"
        "first, second = make('first'), make('second')\n",
    )
    found = app_handlers(["shop", "factory"], [], {})
    assert found == {"mail": "shop.mail:mail", "first": "factory:first", "second": "factory:second"}


def test_all_says_which_classes_are_exported(folder: Path) -> None:
    text = "class A:\n    job_type = 'a'\n    def handle(self, job): ...\n"
    write(folder, exports="__all__ = ['B']\n" + text + text.replace("A:", "B:").replace("'a'", "'b'"))
    assert app_handlers(["exports"], [], {}) == {"b": "exports:B"}


@pytest.mark.parametrize(("text", "said"), [
    ("x = 1\n", ["--app wrong: no handler found in", "wrong.py", '@job("type")']),
    ("def broken(:\n", ["--app wrong: cannot be imported", 'wrong.py", line 1', "SyntaxError"]),
    ("import no_such_module\n", ["--app wrong", "No module named 'no_such_module'", "line 1"]),
    ("def f():\n    raise OSError('no disk')\nf()\n", ["--app wrong", "line 2, in f", "OSError: no disk"]),
    ("raise SystemExit(0)\n", ["SystemExit: 0", "__main__"]),
    ("import os\nos._exit(7)\n", ["has ended: exit 7"]),
    ("import os\nos.kill(os.getpid(), 9)\n", ["has ended: signal 9"]),
    (SHOUT + SHOUT.replace("def shout", "def two"), ["shout has two handlers: wrong:shout and wrong:two"]),
    (HEAD + "@job('a')\ndef f(payload) -> None: ...\n", ["@job('a') f: parameter payload has no", "line 2"]),
    (HEAD + "@job('a', timeout='60')\ndef f(payload: str) -> None: ...\n", ["timeout is '60'", "wrong.py"]),
    (HEAD + "class A(JobHandler):\n    def handle(self, job: Job) -> None: ...\n", ["wrong:A has no type"]),
    ("class A:\n    job_type = 5\n    def handle(self, job): ...\n", ["wrong:A: job_type is 5"]),
])  # fmt: skip
def test_a_mistake_in_a_module_is_a_configuration_error_that_says_where(
    folder: Path, text: str, said: list[str]
) -> None:
    write(folder, wrong=text)
    error = errors_of("wrong")
    assert [one for one in said if one not in error] == [], error


def test_every_mistake_is_named_at_once(folder: Path) -> None:
    write(folder, one=HEAD + "@job('a')\ndef f() -> None: ...\n@job('b')\ndef g(a, b) -> None: ...\n")
    error = errors_of("one", "no_such_app", "one.no_such_part")
    for said in ("f: its parameters", "g: parameter a", "there is no module no_such_app"):
        assert said in error
    assert "there is no module one.no_such_part" in error


def test_output_and_threads_of_a_module_disturb_nothing(folder: Path) -> None:
    more = "import threading, time\nprint('x' * 100_000)\n"
    write(folder, loud=f"{SHOUT}{more}threading.Thread(target=time.sleep, args=(900,)).start()\n")
    assert app_handlers(["loud"], [], {}) == {"shout": "loud:shout"}


def test_a_type_with_two_handlers_is_refused_unless_they_are_the_same() -> None:
    listing = AppListing(handlers=[("audit", "m:audit")])
    with pytest.raises(ConfigurationError, match="audit of m:audit is a built-in type"):
        checked_handlers(listing, ["audit"], {})
    with pytest.raises(ConfigurationError, match="two handlers: m:audit and --handler n:Audit"):
        checked_handlers(listing, [], {"audit": "n:Audit"})
    same = {"audit": "m:audit"}
    assert checked_handlers(listing, ["audit"], same) == same


def test_a_class_without_a_type_may_get_one_from_handler() -> None:
    listing = AppListing(untyped=["m:Greet"])
    assert checked_handlers(listing, [], {"greet": "m:Greet"}) == {}
    with pytest.raises(ConfigurationError, match="class m:Greet has no type"):
        checked_handlers(listing, [], {})


@pytest.mark.parametrize(
    ("text", "hint"),
    [("mymodule.py", "mymodule"), ("my/jobs.py", "my.jobs"), ("a:b", "mypkg.jobs"), ("", "mypkg.jobs")],
)
def test_a_name_that_is_no_module_is_refused_with_an_example(text: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"for example {hint}"):
        parse_app(text)


def test_importing_ends_with_a_message_when_it_takes_too_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobworker.worker.functions.app._IMPORT_WITHIN_S", 0.5)
    write(folder, slow="import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(900)\n")
    assert "importing slow takes longer than" in errors_of("slow")
    file = folder / "pid"
    assert not file.exists() or not os.path.exists(f"/proc/{file.read_text()}")
