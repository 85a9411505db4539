"""Detector of texts in a language that the model does not know: their tokens are mostly the unknown one."""

import logging
from typing import Any

from .base import Plan

log = logging.getLogger("jobworker.embed")

# A window counts as unknown if this share of its tokens is. Chinese with an English model: 0.25 to 0.65.
# English with it: 0.
UNKNOWN_SHARE = 0.25
# Unknown windows before the warning, and their least share of all windows: one odd text is no reason.
MIN_WINDOWS, MIN_SHARE = 3, 0.1


class UnknownTokens:
    """Logs embed.unknown_tokens once, when many windows consist of tokens that the model does not know."""

    def __init__(self, model: str, unknown_id: int | None) -> None:
        self._model, self._unknown_id = model, unknown_id
        self._windows = self._unknown = 0

    def watch(self, plan: Plan) -> None:
        """Count the windows of a plan; a few microseconds each, and nothing after the warning."""
        if self._unknown_id is None:
            return
        for window, weight in zip(plan.windows, plan.weights, strict=True):
            self._windows += 1
            self._unknown += window.count(self._unknown_id) >= UNKNOWN_SHARE * weight
        if self._unknown >= MIN_WINDOWS and self._unknown >= MIN_SHARE * self._windows:
            self._unknown_id = None
            log.warning("embed.unknown_tokens", extra={
                "model": self._model,
                "share": round(self._unknown / self._windows, 2),
                "hint": "searches will hardly find these texts: use a model that knows their language, for "
                "example --model BAAI/bge-m3",
            })  # fmt: skip


def unknown_token_id(tokenizer: Any) -> int | None:
    """The token of unknown words and characters of a `tokenizers.Tokenizer`; None if it has none."""
    token = getattr(tokenizer.model, "unk_token", None) or "<unk>"
    found: int | None = tokenizer.token_to_id(token)
    return found
