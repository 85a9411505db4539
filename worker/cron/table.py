"""Cron tables: jobs enqueued by a schedule, as the configuration file and the job store have them."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec


class CronTable(msgspec.Struct, frozen=True):
    """A ``[[cron]]`` table. ``payload`` is JSON; ``missed`` is ``skip`` or ``once``; ``timeout`` seconds."""

    name: str
    schedule: str
    type: str
    stream: str
    timezone: str = "UTC"
    payload: str = "null"
    tenant_id: str = ""
    project_id: str = ""
    metadata: dict[str, str] = {}
    timeout: float | None = None
    missed: str = "skip"

    @property
    def rule(self) -> str:
        """What determines the ticks. If it changes, ticks before the change are not made up for."""
        return f"{self.schedule} {self.timezone}"

    def job_id(self, tick_s: int) -> str:
        """Id of the job of one tick: the same on every host."""
        return f"cron:{self.name}:{tick_text(tick_s)}"


_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(CronTable).decode


def encode_table(table: CronTable) -> bytes:
    """The table as the job store keeps it; equal tables give equal bytes."""
    return _encode(table)


def decode_table(data: bytes) -> CronTable:
    """The inverse of `encode_table`. Raises ValueError for bytes that are no table."""
    return _decode(data)


def digest(tables: Sequence[CronTable]) -> str:
    """Fingerprint of tables, whatever their order."""
    texts = sorted(map(encode_table, tables))
    return hashlib.sha256(b"\n".join(texts)).hexdigest()[:16]


def tick_text(tick_s: int) -> str:
    """A tick as people and job ids have it: ``2026-01-02T03:00:00Z``."""
    return datetime.fromtimestamp(tick_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
