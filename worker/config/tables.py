"""The tables of the configuration file that are no options: ``[[cron]]``, ``[[limit]]`` and ``[weights]``."""

import tomllib
from pathlib import Path
from typing import Self

import msgspec

from ..cron.config import parse_cron_tables
from ..cron.table import CronTable
from ..errors import ConfigurationError
from ..flow import FlowConfig, parse_flow
from ..settings import Settings


class ConfigTables(msgspec.Struct, frozen=True):
    """The tables of one file; ``flow`` is None where it has neither limits nor weights."""

    cron: tuple[CronTable, ...] = ()
    flow: FlowConfig | None = None

    @classmethod
    def load(cls, settings: Settings) -> Self:
        """Read the file that ``settings`` names; there are no tables if it names none.

        Raises `ConfigurationError`, which names the file and the table.
        """
        path = settings.config_file
        if not path:
            return cls()
        try:
            found = tomllib.loads(Path(path).read_text("utf-8"))
            cron = parse_cron_tables(found.get("cron", []), [source.stream for source in settings.streams])
            flow = parse_flow({name: found[name] for name in ("limit", "weights") if name in found})
        except (OSError, ValueError, RecursionError, ConfigurationError) as error:
            raise ConfigurationError(f"{path}: {error or 'nested too deeply'}") from error
        return cls(cron, flow)
