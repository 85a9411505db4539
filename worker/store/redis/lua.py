"""Lua scripts of a folder: called by their SHA, loaded when the server lacks them."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

Argument = bytes | str | int | float
Command = Sequence[Argument]

#: Scripts that act for a reader: they check its epoch and the ownership of entries first.
_EPOCH_SCRIPTS = frozenset(
    {
        "settle",
        "set_deaths",
        "renew",
        "release",
        "claim",
        "renew_name",
        "sort",
        "take",
        "screen",
        "claim_keys",
        "batch_register",
        "hand_back",
    }
)
#: Scripts that use the record of the service that owns a consumer's name.
_NAME_SCRIPTS = frozenset({"acquire", "renew_name", "remove_consumers", "find_lost", "find_idle"})
#: Scripts that read what XINFO says of groups or consumers.
_INFO_SCRIPTS = frozenset({"trim", "forward_take", "cancel", "remove_consumers", "find_lost", "find_idle"})
#: Scripts that move jobs into lanes or out of them, or that end jobs which hold slots.
_FLOW_SCRIPTS = frozenset({"sort", "take", "settle", "configure", "mend_slots", "screen", "cancel"})
#: Scripts that compare entry ids.
_ID_SCRIPTS = frozenset({"trim", "cancel", "screen", "forward_take", "forward_add", "forward_done"})
#: Scripts that compare jobs with others of their idempotency and supersede keys.
_CONDITION_SCRIPTS = frozenset({"screen", "take", "settle"})
#: Scripts that count the jobs of batches.
_BATCH_SCRIPTS = frozenset(
    {
        *("settle", "sort", "batch_register", "batch_open", "batch_close", "batch_finish", "batch_sweep"),
        *("batch_mend", "cancel", "screen", "hand_back"),
    }
)


class LuaScripts:
    """Every ``*.lua`` file of a folder, by name. A call returns the command that runs one.

    A prelude is a file that is prepended to the scripts that use it.
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
    {
        "prelude_epoch": _EPOCH_SCRIPTS,
        "prelude_info": _INFO_SCRIPTS,
        "prelude_name": _NAME_SCRIPTS,
        "prelude_ids": _ID_SCRIPTS,
        "prelude_flow": _FLOW_SCRIPTS,
        "prelude_batch": _BATCH_SCRIPTS,
        "prelude_conditions": _CONDITION_SCRIPTS,
        "prelude_cancel": frozenset({"settle", "cancel"}),
        "prelude_results": frozenset({"settle"}),
    },
)
