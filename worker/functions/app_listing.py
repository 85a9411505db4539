"""Child that imports the modules of ``--app`` and lists their handlers, so that the supervisor does not.

``python -m jobworker.worker.functions.app_listing FD APPS OTHERS`` writes an `AppListing` to the descriptor.
APPS and OTHERS are JSON lists of modules.
"""

import inspect
import os
import site
import sys
import sysconfig
import traceback
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import msgspec
import orjson

from ..errors import ConfigurationError
from ..extension import search_current_folder
from ..handler import BatchHandler, BoundHandler, JobHandler
from .app import AppListing
from .job_function import FunctionHandler, check_job_type, job_type_of

#: Frames of a failed import that are shown: the user's own, innermost.
_SHOWN_FRAMES = 10
_MAX_ERROR_CHARS = 4096
#: Folders whose files no developer edits while a service runs.
_INSTALLED = (
    site.getusersitepackages() + os.sep,
    *{sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")},
)
_OURS = str(Path(__file__).resolve().parents[2]) + os.sep


def main() -> None:
    """Import and list; whatever the modules have started ends with the process."""
    fd, apps, others = int(sys.argv[1]), orjson.loads(sys.argv[2]), orjson.loads(sys.argv[3])
    search_current_folder()
    listing = AppListing()
    for name in apps:
        if (module := _imported(name, f"--app {name}", listing)) is not None:
            _list(module, listing)
    for name in others:
        _imported(name, f"--handler {name}", listing)
    listing.files = sorted({*listing.files, *_files()})
    os.write(fd, msgspec.json.encode(listing))
    sys.stdout.flush()
    # Threads of the modules, and what they do at the interpreter's end, are of no interest here.
    os._exit(0)


def _imported(name: str, label: str, listing: AppListing) -> ModuleType | None:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name is not None and (name == error.name or name.startswith(f"{error.name}."))
        text = f"there is no module {error.name}" if missing else _describe(error)
    except BaseException as error:  # sys.exit() among them: the module is a program without a guard
        text = _describe(error)
        if isinstance(error, SyntaxError) and error.filename:
            listing.files.append(error.filename)
    listing.errors.append(f"{label}: {text}"[:_MAX_ERROR_CHARS])
    return None


def _describe(error: BaseException) -> str:
    """The error with the user's frames: those of the import machinery and of this file say nothing."""
    inner = error.__traceback__
    while inner is not None and _is_machinery(inner.tb_frame.f_code.co_filename):
        inner = inner.tb_next
    frames = [] if inner is None else traceback.extract_tb(inner)
    shown = [one for one in frames if not one.filename.startswith("<frozen ")]
    lines = traceback.format_list(shown[-_SHOWN_FRAMES:])
    said = "".join(traceback.format_exception_only(error)).rstrip()
    if isinstance(error, SystemExit):
        said += ': the module ends the program; guard that by `if __name__ == "__main__":`'
    return f"cannot be imported\n{''.join(lines)}{said}"


def _is_machinery(file: str) -> bool:
    return file == __file__ or file.startswith("<frozen ") or file.endswith("/importlib/__init__.py")


def _list(module: ModuleType, listing: AppListing) -> None:
    """Add the handlers of a module, and of those modules of its package that it has imported."""
    before = len(listing.handlers) + len(listing.untyped) + len(listing.errors)
    seen = {target for _, target in listing.handlers}
    known: set[int] = set()
    for part in [module, *_submodules(module)]:
        for name, value in list(vars(part).items()):
            own = getattr(value, "__module__", "") or ""
            if id(value) in known or (part is not module and own != part.__name__):
                continue
            target = f"{part.__name__}:{name}"
            if (job_type := job_type_of(value)) is not None:
                known.add(id(value))
                _check_function(value, listing)
            elif inspect.isclass(value) and _is_exported(part, name) and _is_handler(value):
                known.add(id(value))
                job_type = _type_of_class(value, target, own == part.__name__, listing)
            # An imported function is listed under the module that has it, if that is an app's too.
            if job_type is not None and (home := _home(value, target)) not in seen:
                listing.handlers.append((job_type, home))
    if before == len(listing.handlers) + len(listing.untyped) + len(listing.errors) and not known:
        where = getattr(module, "__file__", None)
        listing.errors.append(
            f'--app {module.__name__}: no handler found{f" in {where}" if where else ""}: put @job("type") '
            'before a function, or job_type = "type" into a handler class, and import it there'
        )


def _submodules(module: ModuleType) -> Iterator[ModuleType]:
    for name, other in sorted(sys.modules.items()):
        if name.startswith(f"{module.__name__}.") and isinstance(other, ModuleType):
            yield other


def _home(value: typing.Any, target: str) -> str:
    """``module:name`` where a function or class is defined, if it has that name there; else ``target``."""
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    at_home = getattr(sys.modules.get(module), name, None) is value
    return f"{module}:{name}" if at_home else target


def _check_function(function: typing.Any, listing: AppListing) -> None:
    """Find wrong signatures and options here, so that the service does not start with them."""
    try:
        BoundHandler(str(job_type_of(function)), FunctionHandler(function), 1.0)
    except ConfigurationError as error:
        code = function.__code__
        listing.errors.append(f"{error} ({code.co_filename}, line {code.co_firstlineno})")


def _is_exported(module: ModuleType, name: str) -> bool:
    exported = getattr(module, "__all__", None)
    return not name.startswith("_") if exported is None else name in exported


def _is_handler(value: type) -> bool:
    has_method = callable(getattr(value, "handle", None)) or callable(getattr(value, "handle_batch", None))
    return has_method and not inspect.isabstract(value)


def _type_of_class(value: type, target: str, is_own: bool, listing: AppListing) -> str | None:
    job_type = getattr(value, "job_type", None)
    if job_type is None:
        # Other classes with a method `handle`, of logging for instance, are none of ours.
        if is_own and issubclass(value, JobHandler | BatchHandler):
            listing.untyped.append(target)
        return None
    try:
        check_job_type(job_type, f"{target}: job_type is {job_type!r:.80}")
    except ConfigurationError as error:
        listing.errors.append(f"--app: {error}")
        return None
    return str(job_type)


def _files() -> Iterator[str]:
    """Source files of the loaded modules, without those of the installation and of this package."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        path = os.path.abspath(file)
        if not path.startswith((*_INSTALLED, _OURS)):
            yield path


if __name__ == "__main__":
    main()
