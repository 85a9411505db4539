"""Embedding of the texts of several jobs: cached vectors first, the rest by the model in one pass."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jobworker.worker import PermanentError

from ..encoder.base import Encoded, Encoder, Plan, UnsuitableText, Vectors, embed
from ..encoder.unknown_tokens import UnknownTokens
from ..jobstore.usage import Usage
from ..sparse_vector import SparseVector
from .vector_cache import CachedVector, Key, NewVector, Origin, VectorCache, cache_key

log = logging.getLogger("jobworker.embed")

# Assumed rate before the first measurement: a small model on one core.
FIRST_RATE_BYTES_S = 10_000.0
# Weight of the latest pass in the moving average.
RATE_WEIGHT = 0.3
# Smaller passes measure their overhead rather than the rate.
RATE_FROM_BYTES = 2_000


class EmbedRequest(NamedTuple):
    """The texts of one job; `origins`, one a text, are for the cache."""

    tenant_id: str
    texts: Sequence[str]
    origins: Sequence[Origin]


@dataclass
class Prepared:
    """Result of the cache lookup and the tokeniser, for a part of a batch.

    A job is named by its index in the batch, a text by its index in `texts` (the texts of all jobs in order).
    `jobs_of_texts`, `origins` and `keys` have one entry a text; `keys` is empty without a cache. `plan`
    covers the texts in `uncached`; it is None if the tokeniser failed, but not for the length of a text.
    """

    requests: Mapping[int, EmbedRequest]
    jobs_of_texts: list[int]
    texts: list[str]
    origins: list[Origin]
    keys: list[Key]
    cached: dict[Key, CachedVector]
    uncached: list[int]
    plan: Plan | None
    failed: dict[int, Exception]


class _Text(NamedTuple):
    """Vectors of one text."""

    vector: Vectors
    sparse: SparseVector | None


class Computed(NamedTuple):
    """Vectors, shape (texts, dim), or the error of each job; `cache_entries` are new ones.

    `usage`: what the texts of each tenant cost.
    """

    vectors: dict[int, Encoded]
    failed: dict[int, Exception]
    cache_entries: list[NewVector]
    usage: Mapping[str, Usage] = MappingProxyType({})


class Embedder:
    """Encoder and vector cache behind one interface.

    `prepare`, `compute` and `save_to_cache` may run in three threads, one call of each at a time. Adds
    `forward_seconds` to the encoder's counters.
    """

    def __init__(
        self,
        encoder: Encoder,
        cache: VectorCache | None,
        *,
        long_text: str,
        sparse: bool = False,
        mono_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sparse`: compute and cache sparse vectors too, if the model gives them."""
        self._encoder, self._cache, self._mono_s = encoder, cache, mono_s
        self._sparse = sparse and encoder.has_sparse
        kinds = ("document", "sparse") if self._sparse else ("document",)
        self._identity = "\0".join(
            (encoder.revision, str(encoder.dim), str(encoder.max_tokens), long_text, *kinds)
        )
        self._unknown_tokens = UnknownTokens(encoder.name, encoder.unknown_id)
        # Several job types share an encoder.
        encoder.counters.setdefault("forward_seconds", 0.0)
        #: Recent rate of the model, bytes of text a second.
        self.rate_bytes_s = FIRST_RATE_BYTES_S

    def prepare(self, requests: Mapping[int, EmbedRequest]) -> Prepared:
        """Look up every text in the cache and tokenise the others; keys are job indexes."""
        jobs_of_texts = [job for job, request in requests.items() for _ in request.texts]
        texts = [text for request in requests.values() for text in request.texts]
        origins = [origin for request in requests.values() for origin in request.origins]
        keys: list[Key] = []
        prepared = Prepared(requests, jobs_of_texts, texts, origins, keys, {}, [], None, {})
        if self._cache:
            tenants = [request.tenant_id for request in requests.values() for _ in request.texts]
            keys += map(cache_key, tenants, [self._identity] * len(texts), texts)
            prepared.cached = self._cache.lookup(keys, origins)
        prepared.uncached = [i for i in range(len(texts)) if not keys or keys[i] not in prepared.cached]
        self._tokenize(prepared)
        return prepared

    def _tokenize(self, prepared: Prepared) -> None:
        while prepared.uncached and prepared.plan is None:
            try:
                prepared.plan = self._encoder.tokenize([prepared.texts[i] for i in prepared.uncached])
            except UnsuitableText as error:
                unsuitable = {prepared.jobs_of_texts[prepared.uncached[index]] for index in error.indexes}
                prepared.failed |= dict.fromkeys(unsuitable, PermanentError(str(error)))
                jobs = prepared.jobs_of_texts
                prepared.uncached = [i for i in prepared.uncached if jobs[i] not in unsuitable]
            except Exception:
                return  # `compute` tries the jobs one by one and reports the error
            else:
                self._unknown_tokens.watch(prepared.plan)

    def compute(self, prepared: Prepared) -> Computed:
        """Run the forward pass. If it fails, run it job by job, so that only the jobs at fault fail."""
        failed = dict(prepared.failed)
        vectors: dict[int, _Text] = {}
        tokens = _tokens_of(prepared)
        forward_s = self._encoder.counters["forward_seconds"]
        remaining = {prepared.jobs_of_texts[index] for index in prepared.uncached}
        if prepared.plan is not None:
            try:
                texts = _texts(self._forward(prepared, prepared.plan))
                vectors = dict(zip(prepared.uncached, texts, strict=True))
                remaining = set()
            except Exception as error:
                if len(prepared.requests) == 1:
                    return Computed({}, failed | dict.fromkeys(prepared.requests, error), [])
                log.warning("embed.batch_split", extra={"jobs": len(remaining), "error": str(error)})
        for job in remaining:
            self._compute_job(prepared, job, vectors, failed)
        took_s = self._encoder.counters["forward_seconds"] - forward_s
        return _computed(prepared, vectors, failed, tokens, took_s, self._sparse)

    def _forward(self, prepared: Prepared, plan: Plan) -> Encoded:
        started_s = self._mono_s()
        vectors = embed(self._encoder, plan, sparse=self._sparse)
        took_s = self._mono_s() - started_s
        self._encoder.counters["forward_seconds"] += took_s
        size = sum(_utf8_bytes(prepared.texts[index]) for index in prepared.uncached)
        if size >= RATE_FROM_BYTES and took_s > 0:
            self.rate_bytes_s += RATE_WEIGHT * (size / took_s - self.rate_bytes_s)
        return vectors

    def _compute_job(
        self, prepared: Prepared, job: int, vectors: dict[int, _Text], failed: dict[int, Exception]
    ) -> None:
        own = [index for index in prepared.uncached if prepared.jobs_of_texts[index] == job]
        try:
            plan = self._encoder.tokenize([prepared.texts[index] for index in own])
            computed = embed(self._encoder, plan, sparse=self._sparse)
        except UnsuitableText as error:
            failed[job] = PermanentError(str(error))
        except Exception as error:
            failed[job] = error
        else:
            vectors |= zip(own, _texts(computed), strict=True)

    def save_to_cache(self, computed: Sequence[Computed]) -> None:
        """Cache the vectors that were not cached before."""
        if self._cache:
            self._cache.put(entry for part in computed for entry in part.cache_entries)


def divide(request: EmbedRequest, part_bytes: float) -> Iterator[EmbedRequest]:
    """The texts in order, in parts of about `part_bytes` bytes of UTF-8, at least one text each."""
    start, filled = 0, 0
    for stop, text in enumerate(request.texts, 1):
        filled += _utf8_bytes(text)
        if filled >= part_bytes:
            yield request._replace(texts=request.texts[start:stop], origins=request.origins[start:stop])
            start, filled = stop, 0
    if start < len(request.texts):
        yield request._replace(texts=request.texts[start:], origins=request.origins[start:])


def size_bytes(request: EmbedRequest) -> int:
    """UTF-8 bytes of the texts: about three a token, in Chinese and in English."""
    return sum(map(_utf8_bytes, request.texts))


def _tokens_of(prepared: Prepared) -> dict[int, int]:
    """The tokens of each text that the model is given; empty if they are not known yet."""
    tokens = dict.fromkeys(prepared.uncached, 0)
    if prepared.plan is not None:
        for window, owner in zip(prepared.plan.windows, prepared.plan.owners, strict=True):
            tokens[prepared.uncached[owner]] += len(window)
    return tokens


def _texts(embedded: Encoded) -> list[_Text]:
    if embedded.sparse is None:
        return [_Text(vector, None) for vector in embedded.vectors]
    return [_Text(*pair) for pair in zip(embedded.vectors, embedded.sparse, strict=True)]


def _computed(
    prepared: Prepared,
    vectors: dict[int, _Text],
    failed: dict[int, Exception],
    tokens: Mapping[int, int],
    took_s: float,
    sparse: bool,
) -> Computed:
    """Join computed vectors (by text index) and cached ones, job by job."""
    by_job: dict[int, list[_Text | CachedVector]] = {
        job: [] for job in prepared.requests if job not in failed
    }
    for index, job in enumerate(prepared.jobs_of_texts):
        if job in by_job:
            by_job[job].append(vectors.get(index) or prepared.cached[prepared.keys[index]])
    stacked = {
        job: Encoded(
            np.stack([one.vector for one in of_job]),
            [one.sparse for one in of_job if one.sparse] if sparse else None,
        )
        for job, of_job in by_job.items()
    }
    entries = [
        NewVector(prepared.keys[index], one.vector, prepared.origins[index], tokens[index], one.sparse)
        for index, one in (vectors.items() if prepared.keys else ())
    ]
    return Computed(stacked, failed, entries, _usage(prepared, vectors, tokens, took_s))


def _usage(
    prepared: Prepared, vectors: Mapping[int, _Text], tokens: Mapping[int, int], took_s: float
) -> dict[str, Usage]:
    """What was spent for each tenant; the time is divided by tokens."""
    usage: dict[str, Usage] = {}
    us_a_token = 1e6 * took_s / max(1, sum(tokens[index] for index in vectors))
    for index, job in enumerate(prepared.jobs_of_texts):
        tenant_id = prepared.requests[job].tenant_id
        if index in vectors:
            one = Usage(embedded_tokens=tokens[index], model_us=round(tokens[index] * us_a_token))
        elif prepared.keys and (cached := prepared.cached.get(prepared.keys[index])):
            one = Usage(spared_tokens=cached.tokens)
        else:
            continue
        usage[tenant_id] = usage.get(tenant_id, Usage()) + one
    return usage


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
