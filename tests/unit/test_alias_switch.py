"""The alias switch on a server whose proxies cache the old collection during the switch."""

from collections.abc import Callable
from typing import Any

import pytest

from jobworker.handlers.rebuild import milvus as rebuild_milvus
from jobworker.handlers.rebuild.milvus import MilvusShadow


class StaleAliasCache:
    """A server whose proxy clears an alias from its cache before the alter, and resolves it in between."""

    timeout_s = 30.0

    def __init__(self) -> None:
        self.aliases = {"z_story_segments": "z_story_segments_v1"}
        self.cached: dict[str, str] = {}

    def call(self, what: str, do: Callable[[Any], Any]) -> Any:
        return do(self)

    def alter_alias(self, collection: str, alias: str, timeout: float) -> None:
        self.cached.pop(alias, None)
        self.resolve(alias)  # a search comes in between
        self.aliases[alias] = collection

    def resolve(self, alias: str) -> str:
        """The collection to which the proxy sends writes to the alias."""
        return self.cached.setdefault(alias, self.aliases[alias])


def test_after_the_switch_writes_go_to_the_new_collection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rebuild_milvus, "STALE_ALIAS_S", 0.0)
    link: Any = StaleAliasCache()
    MilvusShadow(link, prefix="z_", named=False).switch_alias("story_segments", "z_story_segments_v2")
    assert link.resolve("z_story_segments") == "z_story_segments_v2"
