"""Texts of several jobs to vectors: those seen before from the cache, the others by the model in one pass."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jobworker.worker import PermanentError

from ..encoder.base import Encoder, Plan, TextTooLong, Vectors
from .vector_cache import Key, VectorCache, key_of

log = logging.getLogger("jobworker.embed")

# The pace that is taken for granted before anything was measured: that of a small model on one core.
FIRST_PACE_BYTES_S = 10_000.0
# How much the latest pass says about the pace.
PACE_WEIGHT = 0.3
# Passes below this say more of their overhead than of the pace.
PACE_FROM_BYTES = 2_000


class EmbedRequest(NamedTuple):
    """What one job wants to have embedded."""

    tenant_id: str
    texts: Sequence[str]


@dataclass
class Prepared:
    """Looked up and tokenised. All lists count the texts through all jobs; `plan` is of those `missing`.

    `keys` is empty without a cache. `plan` is None where tokenising failed for another reason than a text's
    length; `failed` has the jobs that are lost already.
    """

    asks: Mapping[int, EmbedRequest]
    places: list[int]
    texts: list[str]
    keys: list[Key]
    known: dict[Key, Vectors]
    missing: list[int]
    plan: Plan | None
    failed: dict[int, Exception]


class Computed(NamedTuple):
    """Vectors, shape (texts, dim), or what went wrong, for each job; `fresh` is what the cache lacks."""

    vectors: dict[int, Vectors]
    failed: dict[int, Exception]
    fresh: list[tuple[Key, Vectors]]


class Embedder:
    """`prepare` and `keep` may run beside `compute`, in other threads, one call of each at a time.

    Adds `forward_milliseconds` to the encoder's counters.
    """

    def __init__(
        self,
        encoder: Encoder,
        cache: VectorCache | None,
        *,
        long_text: str,
        mono_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._encoder, self._cache, self._mono_s = encoder, cache, mono_s
        self._identity = "\0".join(
            (encoder.revision, str(encoder.dim), str(encoder.max_tokens), long_text, "document")
        )
        self._forward_s = 0.0
        encoder.counters["forward_milliseconds"] = 0
        #: Recent rate of the model, bytes of text a second.
        self.pace_bytes_s = FIRST_PACE_BYTES_S

    def prepare(self, asks: Mapping[int, EmbedRequest]) -> Prepared:
        """Look every text up and tokenise those that are not known; jobs go by their place."""
        places = [place for place, ask in asks.items() for _ in ask.texts]
        texts = [text for ask in asks.values() for text in ask.texts]
        keys: list[Key] = []
        prepared = Prepared(asks, places, texts, keys, {}, [], None, {})
        if self._cache:
            tenants = [ask.tenant_id for ask in asks.values() for _ in ask.texts]
            keys += map(key_of, tenants, [self._identity] * len(texts), texts)
            prepared.known = self._cache.find(keys)
        prepared.missing = [i for i in range(len(texts)) if not self._cache or keys[i] not in prepared.known]
        self._tokenize(prepared)
        return prepared

    def _tokenize(self, prepared: Prepared) -> None:
        while prepared.missing and prepared.plan is None:
            try:
                prepared.plan = self._encoder.tokenize([prepared.texts[i] for i in prepared.missing])
            except TextTooLong as error:
                bad = {prepared.places[prepared.missing[index]] for index in error.indexes}
                prepared.failed |= dict.fromkeys(bad, PermanentError(str(error)))
                prepared.missing = [i for i in prepared.missing if prepared.places[i] not in bad]
            except Exception:
                return  # shown by `compute`, which tries the jobs one by one

    def compute(self, prepared: Prepared) -> Computed:
        """The forward pass; where it fails for all, job by job, so that only those at fault fail."""
        failed = dict(prepared.failed)
        fresh: dict[int, Vectors] = {}
        alone = {prepared.places[index] for index in prepared.missing}
        if prepared.plan is not None:
            try:
                fresh = dict(zip(prepared.missing, self._forward(prepared, prepared.plan), strict=True))
                alone = set()
            except Exception as error:
                if len(prepared.asks) == 1:
                    return Computed({}, failed | dict.fromkeys(prepared.asks, error), [])
                log.warning("embed.batch_split", extra={"jobs": len(alone), "error": str(error)})
        for place in alone:
            self._compute_alone(prepared, place, fresh, failed)
        return self._computed(prepared, fresh, failed)

    def _forward(self, prepared: Prepared, plan: Plan) -> Vectors:
        began = self._mono_s()
        vectors = self._encoder.forward(plan)
        took_s = self._mono_s() - began
        self._forward_s += took_s
        self._encoder.counters["forward_milliseconds"] = int(self._forward_s * 1000)
        size = sum(_bytes(prepared.texts[index]) for index in prepared.missing)
        if size >= PACE_FROM_BYTES and took_s > 0:
            self.pace_bytes_s += PACE_WEIGHT * (size / took_s - self.pace_bytes_s)
        return vectors

    def _compute_alone(
        self, prepared: Prepared, place: int, fresh: dict[int, Vectors], failed: dict[int, Exception]
    ) -> None:
        own = [index for index in prepared.missing if prepared.places[index] == place]
        try:
            vectors = self._encoder.encode([prepared.texts[index] for index in own])
        except TextTooLong as error:
            failed[place] = PermanentError(str(error))
        except Exception as error:
            failed[place] = error
        else:
            fresh |= zip(own, vectors, strict=True)

    def _computed(
        self, prepared: Prepared, fresh: dict[int, Vectors], failed: dict[int, Exception]
    ) -> Computed:
        rows: dict[int, list[Vectors]] = {place: [] for place in prepared.asks if place not in failed}
        for index, place in enumerate(prepared.places):
            if place in rows:
                known = fresh.get(index)
                rows[place].append(prepared.known[prepared.keys[index]] if known is None else known)
        vectors = {place: np.stack(some) for place, some in rows.items()}
        keep = [(prepared.keys[index], vector) for index, vector in fresh.items()] if prepared.keys else []
        return Computed(vectors, failed, keep)

    def keep(self, computed: Sequence[Computed]) -> None:
        """Put what was computed into the cache."""
        if self._cache:
            self._cache.keep(entry for one in computed for entry in one.fresh)


def size_bytes(ask: EmbedRequest) -> int:
    """How much text there is, in bytes of UTF-8: three are about a token, in Chinese and in English."""
    return sum(map(_bytes, ask.texts))


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
