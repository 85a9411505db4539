"""Progress of rebuilds, for `jobworker explain`."""

from jobworker.worker.extension import Progress
from jobworker.worker.scripted_redis import ScriptedRedis

from ..jobstore.keys import REBUILT_KEY, writes_keys
from ..jobstore.scripts import script


def read_progress(redis_url: str) -> list[Progress]:
    """Every rebuild that is not done, also between two tries of its job.

    Raises `StoreUnavailable`.
    """
    store = ScriptedRedis(redis_url, scripts=script)
    try:
        names = [name.decode() for name in store.one(REBUILT_KEY, ("SMEMBERS", REBUILT_KEY))]
        states = [(name, _state(store, writes_keys(name).rebuild)) for name in sorted(names)]
    finally:
        store.close()
    return [_progress(name, state) for name, state in states if state.get("phase", "done") != "done"]


def _state(store: ScriptedRedis, key: str) -> dict[str, str]:
    flat = [part.decode() for part in store.one(key, ("HGETALL", key))]
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _progress(collection: str, state: dict[str, str]) -> Progress:
    """In words, for instance: z_novel_story_segments: fill, 4000 of 10000 rows (40 %)."""
    phase, copied, rows = state["phase"], int(state.get("copied", 0)), int(state.get("total", 0))
    share = f" ({100 * min(copied, rows) // rows} %)" if rows else ""
    return Progress(
        state.get("job", ""),
        f"{collection}: {phase}, {copied} of {rows} rows{share}",
        {"rebuilds": collection, "phase": phase, "rows_copied": copied, "rows": rows},
    )
