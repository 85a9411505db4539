"""Lua scripts of one folder: sent by their SHA, loaded where the server lacks them."""

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

Argument = bytes | str | int | float
Command = Sequence[Argument]

#: Scripts that act for a reader: the check of its epoch and of ownership goes before them.
_READER_SCRIPTS = frozenset({"settle", "charge", "renew", "release", "take_over"})
_PRELUDE = "reader"


class LuaScripts:
    """Every ``*.lua`` file of a folder, by name. Calling it gives the command that runs one."""

    def __init__(
        self, folder: Traversable, *, prelude: str = "", with_prelude: frozenset[str] = frozenset()
    ) -> None:
        bodies = {
            f.name.removesuffix(".lua"): f.read_bytes() for f in folder.iterdir() if f.name.endswith(".lua")
        }
        head = bodies.pop(prelude, b"")
        self.sources = {
            name: head + body if name in with_prelude else body for name, body in sorted(bodies.items())
        }
        self._shas = {
            name: hashlib.sha1(source, usedforsecurity=False).hexdigest()
            for name, source in self.sources.items()
        }

    def __call__(self, name: str, keys: Sequence[str], *arguments: Argument) -> list[Argument]:
        """The command that runs ``<name>.lua``. Raises `KeyError` where the folder has no such script."""
        return ["EVALSHA", self._shas[name], len(keys), *keys, *arguments]


#: The scripts of the engine itself.
script = LuaScripts(
    files("jobworker.worker.store.redis") / "scripts", prelude=_PRELUDE, with_prelude=_READER_SCRIPTS
)
