"""Lua scripts of one folder: sent by their SHA, loaded where the server lacks them."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

Argument = bytes | str | int | float
Command = Sequence[Argument]

#: Scripts that act for a reader: the check of its epoch and of ownership goes before them.
_READER_SCRIPTS = frozenset({"settle", "charge", "renew", "release", "take_over", "hold"})
#: Scripts that look at the record of the service that holds a name.
_HOLDER_SCRIPTS = frozenset({"acquire", "hold", "remove_consumers"})


class LuaScripts:
    """Every ``*.lua`` file of a folder, by name. Calling it gives the command that runs one.

    A prelude is a file that is put before the scripts that use it.
    """

    def __init__(self, folder: Traversable, preludes: Mapping[str, frozenset[str]] | None = None) -> None:
        preludes = preludes or {}
        bodies = {
            f.name.removesuffix(".lua"): f.read_bytes() for f in folder.iterdir() if f.name.endswith(".lua")
        }
        self.sources = {
            name: b"".join(
                [bodies[part] for part, users in preludes.items() if name in users] + [bodies[name]]
            )
            for name in sorted(bodies.keys() - preludes.keys())
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
    files("jobworker.worker.store.redis") / "scripts",
    {"reader": _READER_SCRIPTS, "holder": _HOLDER_SCRIPTS},
)
