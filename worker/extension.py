"""Extension: what the built-in job types add to the engine, found by one name and never imported by it.

The engine knows no job type. Streams, routing, options, metrics and servers of the built-in types are
declared in `jobworker.handlers`, as plain values: strings name what is heavy, so that reading them costs
nothing.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigurationError
from .keys import Source

__all__ = [
    "CopySize",
    "Extension",
    "Metric",
    "Progress",
    "Render",
    "Source",
    "WebPage",
    "create",
    "extension",
    "imported",
]

#: The package whose ``EXTENSION`` the engine uses.
_PACKAGE = "jobworker.handlers"


class Metric(NamedTuple):
    """One metric: its kind is counter, gauge or histogram (then ``buckets`` are its upper bounds)."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


class Progress(NamedTuple):
    """How far a long job is: in words, and as facts for machines."""

    job_id: str
    text: str
    facts: Mapping[str, Any]


class CopySize(NamedTuple):
    """Memory in bytes of what each worker with a device loads: of the host, and of a GPU (0 if there is none,
    or if its free memory is unknown).

    ``shared_bytes`` is needed once, ``each_bytes`` by every copy. ``card_free_bytes``: of the GPU with the
    least free memory.
    """

    shared_bytes: int
    each_bytes: int
    card_each_bytes: int = 0
    card_free_bytes: int = 0


#: Renders a template to a response of Starlette. Arguments: the request, the template's name, the HTTP
#: status, and the template's variables as keywords.
Render = Callable[..., Any]


class WebPage(NamedTuple):
    """A page of `jobworker web` for GET requests.

    - ``name``: its entry in the menu; an empty one is not shown.
    - ``templates``: folder of its templates, which may extend ``base.html``.
    - ``answer``: makes the response to a request of Starlette, in a thread.
    """

    path: str
    name: str
    templates: Path
    answer: Callable[[Any, Render], Any]


@dataclass(frozen=True)
class Extension:
    """The built-in job types.

    - ``handlers``: type -> ``module:Class``; ``moved``: targets of earlier releases -> those of today.
    - ``moved_members``: members of handlers of earlier releases -> those of today.
    - ``streams``: read if no ``--stream`` is given; ``stream_of_type``: where producers send a type.
    - ``metrics``: by name.
    - ``settings``: ``module:Class`` of the `Settings` with their options; ``options``: the module with these.
    - ``embedded``: ``module:Class`` of servers that the service starts if no URL is given.
    - ``endpoints``: settings that ``endpoints.json`` repeats.
    - ``progress``: ``module:function`` from the URL of the job store to the `Progress` of each long job.
    - ``doctor``: module with further checks of `jobworker doctor`: its ``OPTIONS`` and ``findings``.
    - ``copy_size``: ``module:function`` from the settings to the `CopySize` of what workers with a device
      load, None if nothing or if its size is unknown; ``copied``: what it is, in words; ``copies_option``:
      sets the number of these workers.
    - ``needs``: handler -> modules of the extra that it needs; ``extra``: the name of that extra.
    - ``api``: ``module:function`` that runs the role of ``--serve-addr``; ``api_needs``: modules for it.
    - ``verbs``: functions ``module:name`` that add commands to the group of `jobworker`.
    - ``pages``: functions ``module:name`` from the URL of the API, empty if none is known, to a `WebPage`.
    - ``packages``: whose versions `jobworker doctor` shows.
    """

    handlers: Mapping[str, str]
    moved: Mapping[str, str]
    moved_members: Mapping[str, str]
    streams: tuple[Source, ...]
    stream_of_type: Mapping[str, str]
    metrics: Mapping[str, Metric]
    settings: str
    options: str
    embedded: tuple[str, ...]
    endpoints: tuple[str, ...]
    progress: str
    doctor: str
    copy_size: str
    copied: str
    copies_option: str
    needs: Mapping[str, tuple[str, ...]]
    extra: str
    api: str
    api_needs: tuple[str, ...]
    packages: tuple[str, ...]
    verbs: tuple[str, ...] = ()
    pages: tuple[str, ...] = ()


@cache
def extension() -> Extension:
    """The extension of this installation. Raises ImportError if the package is missing."""
    found = import_module(_PACKAGE).EXTENSION
    assert isinstance(found, Extension)
    return found


def imported(target: str) -> Any:
    """The class or function that ``module:name`` says, imported now."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def require_extras(handlers: Mapping[str, str], *, serves: bool = False) -> None:
    """Check that the libraries of the built-in handlers are installed; imports none of them.

    ``handlers``: type -> ``module:Class``; ``serves``: whether ``--serve-addr`` is given. Raises
    `ConfigurationError`.
    """
    if serves and (missing := [one for one in extension().api_needs if not _is_installed(one)]):
        raise ConfigurationError(
            f"--serve-addr needs {missing[0]}, which is not installed: {how_to_install(extension().extra)}"
        )
    needs, extra = extension().needs, extension().extra
    for job_type, target in handlers.items():
        for module in needs.get(target, ()):
            if not _is_installed(module):
                raise ConfigurationError(
                    f"type {job_type} needs {module}, which is not installed: {how_to_install(extra)}. For "
                    "types of your own only, give --no-builtin-handlers"
                )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def how_to_install(extra: str) -> str:
    """The command that installs an extra, for messages. The package is on no index."""
    return (
        f"install the extra {extra!r} with pip install '.[{extra}]' in a clone, or with "
        f"pip install 'jobworker[{extra}] @ file:///path/to/jobworker.whl'"
    )


def load(target: str, label: str) -> Any:
    """The class or function that a user names by ``module:name``.

    Modules in the current directory can be imported too, after everything that is installed. Raises
    `ConfigurationError`, which starts with ``label`` and the target, if there is none.
    """
    if not target.startswith(f"{__package__.partition('.')[0]}."):
        search_current_folder()
    try:
        return imported(target)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{label} {target}: {error}") from error


def search_current_folder() -> None:
    """Let modules in the current directory be imported, after everything that is installed."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def instance_of(found: Any, target: str, label: str) -> Any:
    """An instance of a class, created without arguments. Raises as `load` does."""
    try:
        return found()
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{label} {target}: {error}") from error


def create(target: str, label: str) -> Any:
    """An instance of the class that a user names by ``module:Class``. Raises as `load` does."""
    return instance_of(load(target, label), target, label)
