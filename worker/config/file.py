"""The service's TOML file: options by their names, each with a value of the right kind."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

#: TOML's words for the types of `tomllib`; dates and times are all called so.
_KINDS = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "an array",
          dict: "a table"}  # fmt: skip

#: Tables of the file that are no options: `config_tables` reads them.
_TABLES = frozenset({"cron", "limit", "weights"})

#: Names are compared up to this length; the time grows with its square.
_LONGEST_NAME = 64


def read_config(path: str, parameters: Sequence[click.Parameter]) -> dict[str, Any]:
    """The file's values by option, each checked and converted; ``redis_url`` counts as ``redis-url``.

    Raises `click.BadParameter`, which names the file and the key.
    """
    import tomllib  # only then: a service keeps in memory what it imports

    try:
        table = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise click.BadParameter(f"{path}: {error or 'nested too deeply'}") from error
    by_name = {option.removeprefix("--"): parameter for parameter in parameters for option in parameter.opts}
    by_name.pop("config", None)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if key in _TABLES:
            continue
        if name not in by_name:
            raise click.BadParameter(f"{path}: no option {key!r}{did_you_mean(name, by_name)}")
        if name in values:
            raise click.BadParameter(f"{path}: {name} is given twice: with a hyphen and with an underscore")
        try:
            values[name] = _checked(by_name[name], value)
        except click.BadParameter as error:
            raise click.BadParameter(f"{path}: {name}: {error.message}") from None
        except ValueError as error:  # a number with thousands of digits
            raise click.BadParameter(f"{path}: {name}: {error}") from None
    return values


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean lease?`` for the most similar name; empty if none is similar."""
    from difflib import get_close_matches  # only for a mistake: it takes memory of the supervisor

    close = get_close_matches(name[:_LONGEST_NAME], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help for their names"


def misspelt_variables(
    environ: Mapping[str, str], known: Iterable[str], prefix: str
) -> Iterable[tuple[str, str]]:
    """Variables that are no option's and similar to one of an option, each with that one.

    Others with the prefix are left alone: Kubernetes, among others, sets some for a service of our name.
    """
    known = set(known)
    for name in sorted(environ):
        if name.startswith(prefix) and name not in known and len(name) <= _LONGEST_NAME:
            from difflib import get_close_matches  # see `did_you_mean`

            close = get_close_matches(name, known, n=1, cutoff=0.9)
            if close:
                yield name, close[0]


def _checked(parameter: click.Parameter, value: Any) -> Any:
    """The value, converted by the option's type. Raises `click.BadParameter`."""
    if getattr(parameter, "is_flag", False):
        return _of_kind(value, (bool,), "true or false")
    if parameter.multiple:
        every = _of_kind(value, (list,), 'a list of strings, such as ["a", "b"]')
        if not every:
            raise click.BadParameter("an empty list: leave the key out for the default")
        return [_not_empty(_of_kind(one, (str,), "strings in the list")) for one in every]
    kinds = getattr(parameter.type, "kinds", (str,))
    value = _not_empty(_of_kind(value, kinds, getattr(parameter.type, "expected", "a string")))
    parameter.type.convert(value, None, None)
    return value


def _not_empty(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise click.BadParameter("an empty value: leave the key out for the default")
    return value


def _of_kind(value: Any, kinds: tuple[type, ...], expected: str) -> Any:
    # Exactly, because a boolean is an integer to Python.
    if type(value) not in kinds:
        # Without the value: it may be a secret.
        raise click.BadParameter(f"expected {expected}, got {_KINDS.get(type(value), 'a date or time')}")
    return value
