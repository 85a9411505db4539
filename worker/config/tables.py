"""The tables of the configuration file that are no options: ``[[cron]]``, ``[[limit]]`` and ``[weights]``."""

from pathlib import Path
from typing import Self

import msgspec

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
        # A service without a file keeps the memory that these take.
        import tomllib

        from ..cron.config import parse_cron_tables

        try:
            found = tomllib.loads(Path(path).read_text("utf-8"))
            cron = parse_cron_tables(found.get("cron", []), settings.logical_streams)
            flow = parse_flow({name: found[name] for name in ("limit", "weights") if name in found})
        except (OSError, ValueError, RecursionError, ConfigurationError) as error:
            raise ConfigurationError(f"{path}: {error or 'nested too deeply'}") from error
        uneven = [limit.name for limit in flow.limits if limit.key != "tenant"] if flow else []
        if uneven and (settings.shards or settings.drain_shards):
            raise ConfigurationError(
                f"{path}: --shards goes only with limits of key tenant, whose jobs are in one shard; drop "
                f"{', '.join(uneven)}, or do without --shards"
            )
        return cls(cron, flow)
