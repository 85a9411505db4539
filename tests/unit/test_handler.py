"""Handlers of every documented shape, found by name and set up once."""

import asyncio
import contextlib
import functools
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from fractions import Fraction
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from jobworker.worker import ConfigurationError, Handler, Job, PermanentError, Settings
from jobworker.worker.event_loop import EventLoop
from jobworker.worker.handler import BoundHandler, load_handlers, set_up

MODULE = """
from jobworker.worker import PermanentError

ALL_SETUPS = []

class Single:
    timeout = 2.5
    def handle(self, job): pass

class Batch:
    max_batch = 7
    counters = {"texts": 0}
    def __init__(self): self.setups = []
    def setup(self, settings):
        self.setups.append(settings)
        ALL_SETUPS.append(self)
    def handle_batch(self, jobs): return [None if job.id == "good" else ValueError(job.id) for job in jobs]
    def healthy(self): raise ConnectionError("away")

class Neither:
    pass

class NeedsArguments:
    def __init__(self, where): pass
    def handle(self, job): pass

class Broken:
    def setup(self, settings): raise OSError("disk full")
    def handle(self, job): pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's file in the folder where the service was started."""
    name = f"handlers_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return name


def load(**handlers: str) -> dict[str, BoundHandler]:
    return load_handlers(Settings(handlers=handlers, job_timeout_s=300.0))


def job(id: str = "good") -> Job:
    return Job(id, "t", "", "", None, {}, "", "s", "1-1", 0)


def test_a_handler_beside_the_start_folder_is_found(module: str) -> None:
    bound = load(shout=f"{module}:Single")["shout"]
    assert (bound.type_name, bound.timeout_s, bound.max_batch, bound.handle_batch) == ("shout", 2.5, 1, None)
    assert (bound.healthy, dict(bound.counters)) == (None, {})


def test_what_a_handler_leaves_out_has_a_default(module: str) -> None:
    bound = load(b=f"{module}:Batch")["b"]
    assert (bound.timeout_s, bound.max_batch) == (300.0, 7)
    assert bound.healthy is not None
    with pytest.raises(ConnectionError):
        bound.healthy()


def test_a_handler_with_batches_only_can_run_one_job(module: str) -> None:
    bound = load(b=f"{module}:Batch")["b"]
    bound.handle(job())
    with pytest.raises(ValueError, match="bad"):
        bound.handle(job("bad"))


def test_one_class_for_two_types_is_made_and_set_up_once(module: str) -> None:
    load(a=f"{module}:Batch", b=f"{module}:Batch", c=f"{module}:Single")
    (made,) = sys.modules[module].ALL_SETUPS
    assert len(made.setups) == 1
    assert made.setups[0].handlers.keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("no_such_module_at_all:Shout", "no_such_module_at_all"),
        ("{module}:Shout", "Shout"),
        ("{module}:Neither", "neither handle"),
    ],
)
def test_what_cannot_be_a_handler_is_a_clear_error(module: str, target: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        load(t=target.format(module=module))


def test_what_setup_raises_passes_through(module: str) -> None:
    with pytest.raises(OSError, match="disk full"):
        load(t=f"{module}:Broken")


def test_the_protocol_is_what_the_documentation_shows() -> None:
    class Shout:
        def handle(self, job: Job) -> None:
            """Runs it."""

    class Silent:
        def run(self, jobs: Sequence[Job]) -> None:
            """No handler."""

    assert isinstance(Shout(), Handler)
    assert not isinstance(Silent(), Handler)


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    one = EventLoop()
    yield one
    one.close()


class Object:
    """A handler with the members that a test gives it."""

    def __init__(self, **members: Any) -> None:
        self.__dict__.update(members)


def bind(loop: EventLoop, **members: Any) -> BoundHandler:
    return set_up({"t": Object(**members)}, Settings(), loop)["t"]


async def echo(job: Job) -> None:
    await asyncio.sleep(0)
    raise LookupError(job.id)


class AsyncCall:
    async def __call__(self, job: Job) -> None:
        await echo(job)


class Methods:
    @staticmethod
    async def static(job: Job) -> None:
        await echo(job)

    @classmethod
    async def of_class(cls, job: Job) -> None:
        await echo(job)


@functools.wraps(echo)
def runs_it(job: Job) -> None:
    asyncio.run(echo(job))


@pytest.mark.parametrize(
    "handle",
    [echo, functools.partial(echo), AsyncCall(), functools.partial(AsyncCall()), Methods().static,
     Methods().of_class, Methods.of_class, runs_it],
)  # fmt: skip
def test_an_async_function_of_any_form_runs_to_its_end(loop: EventLoop, handle: Any) -> None:
    with pytest.raises(LookupError, match="j1"):
        bind(loop, handle=handle).handle(job("j1"))


def test_all_async_members_run_on_one_loop(loop: EventLoop) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def setup(settings: Settings) -> None:
        loops.append(asyncio.get_running_loop())

    async def handle_batch(jobs: Sequence[Job]) -> list[None]:
        loops.append(asyncio.get_running_loop())
        return [None for _ in jobs]

    async def healthy() -> None:
        loops.append(asyncio.get_running_loop())
        raise ConnectionError("away")

    bound = bind(loop, setup=setup, handle_batch=handle_batch, healthy=healthy)
    assert bound.handle_batch is not None
    assert bound.healthy is not None
    assert bound.handle_batch([job(), job()]) == [None, None]
    bound.handle(job())
    with pytest.raises(ConnectionError, match="away"):
        bound.healthy()
    assert len(loops) == 4
    assert len(set(loops)) == 1


def yields(job: Job) -> Iterator[None]:
    yield


async def yields_async(job: Job) -> Any:
    yield


class YieldingCall:
    def __call__(self, job: Job) -> Iterator[None]:
        yield


@pytest.mark.parametrize("name", ["setup", "handle", "handle_batch", "healthy"])
@pytest.mark.parametrize("function", [yields, yields_async, functools.partial(yields), YieldingCall()])
def test_a_generator_is_refused_at_load_before_any_setup(loop: EventLoop, name: str, function: Any) -> None:
    ran: list[object] = []
    members = {"setup": ran.append, "handle": lambda job: None} | {name: function}
    with pytest.raises(
        ConfigurationError, match=f"handler of t: {name} contains `yield`.*`async def {name}`"
    ):
        bind(loop, **members)
    assert ran == []


def test_a_member_that_cannot_be_called_is_refused_at_load(loop: EventLoop) -> None:
    with pytest.raises(ConfigurationError, match="handler of t: handle is not a function"):
        bind(loop, handle="handle")


async def nothing(*_: object) -> None:
    raise AssertionError("never awaited")


async def returns_a_coroutine(*_: object) -> Any:
    return nothing()


async def returns_a_task(*_: object) -> Any:
    return asyncio.ensure_future(asyncio.sleep(60))


@contextlib.contextmanager
def manages(*_: object) -> Iterator[None]:
    yield


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("method", "says"),
    [
        (lambda *_: nothing(), "returned coroutine, .*`async def {name}`"),
        (lambda *_: yields(job()), "returned generator, .*`yield`"),
        (lambda *_: yields_async(job()), "returned async_generator, .*`yield`"),
        (returns_a_coroutine, "returned coroutine, .*`async def {name}`"),
        (returns_a_task, "returned Task, .*`async def {name}`"),
        (manages, "returned _GeneratorContextManager, .*`yield`"),
        (lambda *_: Future[None](), "returned Future, .*wait for it"),
        (lambda *_: threading.Thread(), "returned Thread, .*wait for it"),
        (lambda *_: AsyncResult.__new__(AsyncResult), "returned ApplyResult, .*wait for it"),
        (lambda *_: map(print, "ab"), "returned map, .*loop"),
    ],
)
@pytest.mark.parametrize("name", ["handle", "handle_batch"])
def test_work_that_was_returned_and_not_run_fails_for_good(
    loop: EventLoop, name: str, method: Callable[..., Any], says: str
) -> None:
    bound = bind(loop, **{name: method})
    with pytest.raises(PermanentError, match=f"^{name} {says.format(name=name)}"):
        bound.handle(job())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("collect", [list, tuple, lambda parts: dict(enumerate(parts))])
def test_work_in_a_returned_container_fails_too(
    loop: EventLoop, collect: Callable[[list[object]], object]
) -> None:
    bound = bind(loop, handle=lambda job: collect([None, Future(), nothing()]))
    with pytest.raises(PermanentError, match=r"^handle returned a \w+ with Future"):
        bound.handle(job())


def test_a_mock_is_an_ordinary_result(loop: EventLoop) -> None:
    bind(loop, handle=lambda job: MagicMock()).handle(job())


def test_a_batch_without_outcomes_says_what_to_return(loop: EventLoop) -> None:
    bound = bind(loop, handle_batch=lambda jobs: None)
    with pytest.raises(PermanentError, match=r"handle_batch returned NoneType: .*\[None\] \* len\(jobs\)"):
        bound.handle(job())


@pytest.mark.parametrize(
    ("member", "values"),
    [
        ("timeout", ["60", 0, -1, True, None, math.nan, math.inf, timedelta(minutes=1)]),
        ("batch_timeout", ["60", 0, math.nan, [60]]),
        ("max_batch", ["32", 0, 1.5, True, math.inf]),
        ("max_batch_bytes", ["1MiB", 0, None]),
        ("alone", ["no", 1, None]),
        ("needs_device", ["false", 0]),
        ("counters", [[("words", 5)], {"words": "5"}, {5: 5}, {"words": 10**400}, {"words": 10**5000}, None]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_at_load(
    loop: EventLoop, member: str, values: list[object]
) -> None:
    for value in values:
        with pytest.raises(
            ConfigurationError, match=f"handler of t: {member} is .*: give .*, or leave it out"
        ):
            bind(loop, handle=print, **{member: value})


@pytest.mark.parametrize("name", ["jobs_completed", "jobs_dead", "worker_restarts", "read_cycles"])
def test_a_counter_with_the_name_of_one_of_the_service_is_refused_at_load(loop: EventLoop, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"handler of t: the service has counters .* {name}: give"):
        bind(loop, handle=print, counters={"words": 0, name: 5})


def test_numbers_of_other_libraries_are_values(loop: EventLoop) -> None:
    members = {"timeout": Fraction(5, 2), "batch_timeout": math.inf, "max_batch_bytes": math.inf}
    assert bind(loop, handle=print, alone=True, counters={"words": 0.5}, **members).timeout_s == 2.5


def test_a_setup_that_returns_a_coroutine_does_not_pass_for_done(loop: EventLoop) -> None:
    with pytest.raises(PermanentError, match="setup returned coroutine"):
        bind(loop, setup=lambda settings: nothing(), handle=print)
    bound = bind(loop, healthy=lambda: nothing(), handle=print)
    assert bound.healthy is not None
    with pytest.raises(PermanentError, match="healthy returned coroutine"):
        bound.healthy()


@pytest.mark.parametrize("result", [0, True, "done", [], {}, iter([1])])
def test_any_other_result_of_handle_is_ignored(loop: EventLoop, result: object) -> None:
    bind(loop, handle=lambda job: result).handle(job())

    async def handle(job: Job) -> object:
        return result

    bind(loop, handle=handle).handle(job())


def test_without_async_handlers_asyncio_is_not_imported() -> None:
    code = """if True:
        import sys
        from jobworker.worker import runner
        from jobworker.worker.handler import set_up
        from jobworker.worker.settings import Settings
        class Plain:
            def handle(self, job): pass
        set_up({"t": Plain()}, Settings())["t"].handle(None)
        print("asyncio" in sys.modules)"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("name", "method", "said"), [
    ("handle", lambda: None, r"`def handle\(self, job\)`"),
    ("handle", lambda job, more: None, r"`def handle\(self, job\)`"),
    ("handle", lambda job, *, more: None, r"`def handle\(self, job\)`"),
    ("handle_batch", lambda: [],  # noqa: PIE807
      r"`def handle_batch\(self, jobs\)`"),
    ("setup", lambda: None, r"`def setup\(self, settings\)`"),
    ("healthy", lambda settings: None, r"`def healthy\(self\)`"),
])  # fmt: skip
def test_a_member_that_takes_other_arguments_is_refused(
    loop: EventLoop, name: str, method: Callable[..., Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        bind(loop, **{"handle": print, name: method})


def test_a_method_without_its_job_is_refused() -> None:
    class Forgetful:
        def handle(self) -> None: ...

    with pytest.raises(ConfigurationError, match=r"handler of t: handle cannot be called"):
        set_up({"t": Forgetful()}, Settings())


def with_client(method: Callable[..., None]) -> Callable[..., None]:
    """A decorator that gives a method one more argument."""

    @functools.wraps(method)
    def call(self: object, job: object) -> None:
        method(self, job, "client")

    return call


def test_members_that_take_more_than_they_must_are_not_refused(loop: EventLoop) -> None:
    class Injected:
        @with_client
        def handle(self, job: Job, client: str) -> None: ...

        def setup(self, settings: Settings, retries: int = 3, **more: object) -> None: ...

    set_up({"t": Injected()}, Settings(), loop)
    bind(loop, handle=lambda *args: None, setup=functools.partial(print, "x"), healthy=print)


def misspellings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record for record in caplog.records if record.message == "handler.member_misspelt"]
    return [str(vars(record)["hint"]).partition("did you mean ")[2] for record in found]


def test_a_name_similar_to_that_of_a_missing_member_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    class Misspelt:
        timout = 60
        max_bacth = 3

        def set_up(self, settings: Settings) -> None: ...

        def handle(self, job: Job) -> None: ...

    handler = Misspelt()
    set_up({"t": handler, "u": handler}, Settings())
    assert misspellings(caplog) == ["max_batch?", "setup?", "timeout?"]


def test_attributes_of_a_users_own_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Own:
        timeout = 60
        timeouts = (1, 2)
        handled = 0
        counter = None
        model = "x"
        _timout = 3

        def __init__(self) -> None:
            self.counters = {"a": 0}
            self.batches = self.client = self.pool = self.time = self.healthy_since = None

        def handle(self, job: Job) -> None: ...

        def handle_page(self, page: str) -> None: ...

        def handler(self) -> None: ...

        def close(self) -> None: ...

    set_up({"t": Own()}, Settings())
    assert misspellings(caplog) == []


def test_a_class_whose_handle_is_misspelt_is_refused_with_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "misspelt_handle.py").write_text("class Shout:\n    def handel(self, job): pass\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="did you mean handle where it has handel"):
        load_handlers(Settings(handlers={"t": "misspelt_handle:Shout"}))
