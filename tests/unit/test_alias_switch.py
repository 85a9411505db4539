"""The switch to a rebuilt collection, where the server does not do what its documentation says."""

from collections.abc import Callable
from typing import Any

import pytest

from jobworker.handlers.rebuild import milvus as milvus_shadow
from jobworker.handlers.rebuild.milvus import MilvusShadow


class ForgetsTooEarly:
    """A link to a server whose proxy forgets an alias before that is altered, and is asked for it then."""

    timeout_s = 30.0

    def __init__(self) -> None:
        self.aliases = {"z_story_segments": "z_story_segments_v1"}
        self.cached: dict[str, str] = {}

    def attempt(self, what: str, do: Callable[[Any], Any]) -> Any:
        return do(self)

    def alter_alias(self, table: str, alias: str, timeout: float) -> None:
        self.cached.pop(alias, None)
        self.stands_for(alias)  # somebody searches just then
        self.aliases[alias] = table

    def stands_for(self, alias: str) -> str:
        """Where the proxy sends what is written to the alias."""
        return self.cached.setdefault(alias, self.aliases[alias])


def test_after_the_switch_no_proxy_sends_writes_to_the_old_collection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(milvus_shadow, "STALE_ALIAS_S", 0.0)
    link: Any = ForgetsTooEarly()
    MilvusShadow(link, prefix="z_", named=False).switch("story_segments", "z_story_segments_v2")
    assert link.stands_for("z_story_segments") == "z_story_segments_v2"
