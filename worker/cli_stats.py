"""``jobworker stats``: how much waits where."""

from typing import Any

import click

from .cli_common import AS_JSON, STREAMS, say_json, sources_of, table, verb
from .keys import Source


def add_to(main: click.Group) -> None:
    """Make it a verb of ``jobworker``."""
    verb(main)(STREAMS(AS_JSON(stats)))


def stats(url: str, streams: tuple[str, ...], as_json: bool) -> None:
    """How much waits, runs, is retried and was given up, stream by stream.

    QUEUED was not given to any worker yet; PENDING was, and is not finished; RETRYING waits for its next
    try; DEAD was given up; OLDEST is how long the oldest queued job has waited.
    """
    from .redis_store import RedisReaperStore

    store = RedisReaperStore(url)
    rows = [_row(store, source) for source in sources_of(streams)]
    store.close()
    if as_json:
        say_json({"streams": rows})
        return
    table(
        ["STREAM", "GROUP", "QUEUED>", "PENDING>", "RETRYING>", "DEAD>", "OLDEST>"],
        [
            [*(str(row[name]) for name in ("stream", "group", "queued", "pending", "retrying", "dead")),
             f"{row['oldest_age_s']:.1f} s"]
            for row in rows
        ],
    )  # fmt: skip


def _row(store: Any, source: Source) -> dict[str, Any]:
    return {"stream": source.stream, "group": source.group, **store.depths(source)._asdict()}
