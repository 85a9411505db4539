"""Dynamic batching: requests that wait while a pass runs go through the model together in the next one."""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..encoder.base import Encoded, Encoder, Plan, Purpose, UnsuitableText, Vectors, embed
from ..sparse_vector import SparseVector
from .errors import ApiError

log = logging.getLogger("jobworker.api")

#: Tokens that may wait, and tokens of one request, in passes: a few seconds of work on any device.
QUEUED_PASSES = 16
#: Longest texts that may wait for the tokenizer, by the tokens that may wait: natural texts of any script
#: have fewer bytes a token. The tokenizer takes one call at a time, 2 s a MiB.
BYTES_PER_TOKEN = 16
#: Shorter texts are tokenised at once: another thread costs more than these take (0.1 ms).
INLINE_CHARS = 4096
#: Rate before the first measurement (tokens a second), and the weight of the latest pass in the average.
FIRST_RATE, RATE_WEIGHT = 2000.0, 0.2
#: Longest time that a client is asked to wait before its next try.
MAX_RETRY_AFTER_S = 30


class _Work:
    """One part of a request: it goes through the model as a whole."""

    __slots__ = ("future", "plan", "sparse", "tokens")

    def __init__(self, plan: Plan, tokens: int, sparse: bool, future: "asyncio.Future[Encoded]") -> None:
        self.plan, self.tokens, self.sparse, self.future = plan, tokens, sparse, future


class EmbeddedTexts(NamedTuple):
    """Vectors of shape (texts, dim), tokens that went through the model, and sparse vectors if asked for."""

    vectors: Vectors
    tokens: int
    sparse: list[SparseVector] | None = None


class Batcher:
    """A model with a queue; one thread runs its passes.

    Without a queue a request starts at once: nothing waits for company. A large request is divided into parts
    of one pass each, which take turns with other requests. Create and call it in the event loop.
    """

    def __init__(
        self, encoder: Encoder, *, on_batch: Callable[[int, int], None] = lambda requests, tokens: None
    ) -> None:
        """``on_batch`` gets the number of requests and of tokens of each pass, in the loop's thread."""
        self.encoder = encoder
        self.pass_tokens = encoder.pass_tokens
        self.max_tokens = QUEUED_PASSES * self.pass_tokens
        self._on_batch = on_batch
        self._loop = asyncio.get_running_loop()
        self._tokenizing = asyncio.Lock()
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenizer")
        self._changed = threading.Condition()
        self._queue: deque[_Work] = deque()
        self._closed = False
        #: Tokens that were admitted and are not computed yet. Only the loop's thread changes it.
        self.waiting_tokens = 0
        self._rate = FIRST_RATE
        self._mono_pass_s = 0.0
        threading.Thread(target=self._run, name="model", daemon=True).start()

    async def embed(self, texts: Sequence[str], purpose: Purpose, *, sparse: bool = False) -> EmbeddedTexts:
        """Embed texts; `sparse`: also the sparse vectors, if the model gives them.

        Raises ApiError: 400 for unsuitable texts, 413 for too many tokens, 429 for a full queue, 500 if the
        model fails, 503 if it was replaced.
        """
        texts_bytes = sum(len(text.encode()) for text in texts)
        if texts_bytes > self.max_tokens * BYTES_PER_TOKEN:
            raise self._too_many(texts_bytes, "bytes", BYTES_PER_TOKEN)
        admitted = texts_bytes // BYTES_PER_TOKEN
        self._admit(admitted)
        parts = []
        try:
            plan = await self._tokenize(texts, purpose)
            tokens = sum(map(len, plan.windows))
            if tokens > self.max_tokens:
                raise self._too_many(tokens, "tokens")
            if tokens > admitted:
                self._admit(tokens - admitted, waiting=self.waiting_tokens - admitted)
                admitted = tokens
            for part in divide(plan, self.pass_tokens):
                parts.append(await self._submit(part, sparse))
        finally:
            self.waiting_tokens -= admitted
        vectors = np.concatenate([part.vectors for part in parts]) if len(parts) > 1 else parts[0].vectors
        both = sparse and self.encoder.has_sparse
        return EmbeddedTexts(
            vectors, tokens, [one for part in parts for one in part.sparse or ()] if both else None
        )

    async def _tokenize(self, texts: Sequence[str], purpose: Purpose) -> Plan:
        try:
            await self._tokenizing.acquire()  # the encoder takes one call at a time
            if self._closed or sum(map(len, texts)) <= INLINE_CHARS:
                try:
                    self._check_open()
                    return self.encoder.tokenize(texts, purpose)
                finally:
                    self._tokenizing.release()
            call = self._loop.run_in_executor(self._tokenizer_thread, self.encoder.tokenize, texts, purpose)
            call.add_done_callback(self._tokenized)
            return await asyncio.shield(call)
        except UnsuitableText as error:
            raise ApiError(400, str(error), code="unsuitable_text", param="input") from error

    def _tokenized(self, call: "asyncio.Future[Plan]") -> None:
        """Let the next request in: the thread may outlast the request's deadline."""
        self._tokenizing.release()
        if not call.cancelled():
            call.exception()  # not logged as never retrieved, if the request has ended

    def _too_many(self, count: int, of_what: str, for_a_token: int = 1) -> ApiError:
        limit = self.max_tokens * for_a_token
        return ApiError(413, f"{count} {of_what} of text; a request may have {limit}: divide it")

    def _admit(self, tokens: int, *, waiting: int | None = None) -> None:
        """Count tokens as waiting. Raises ApiError 429 if others wait already and the queue is full.

        ``waiting``: tokens of other requests, if not all that wait.
        """
        waiting = self.waiting_tokens if waiting is None else waiting
        if waiting and self.waiting_tokens + tokens > self.max_tokens:
            retry_after_s = min(MAX_RETRY_AFTER_S, max(1, math.ceil(self.waiting_tokens / self._rate)))
            raise ApiError(429, "too many tokens wait already", retry_after_s=retry_after_s)
        self.waiting_tokens += tokens

    async def _submit(self, plan: Plan, sparse: bool) -> Encoded:
        work = _Work(plan, sum(map(len, plan.windows)), sparse, self._loop.create_future())
        self._check_open()
        with self._changed:
            self._queue.append(work)
            self._changed.notify()
        return await work.future

    def _check_open(self) -> None:
        if self._closed:  # only the loop's thread closes
            raise ApiError(503, "the model was replaced by another", code="model_loading", retry_after_s=1)

    def pass_s(self) -> float:
        """Seconds for which the current pass has been running; 0.0 while the model is idle."""
        since = self._mono_pass_s
        return time.monotonic() - since if since else 0.0

    def close(self) -> None:
        """End the threads after the requests that were admitted."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._tokenizer_thread.shutdown(wait=False)

    # -- the model's thread

    def _run(self) -> None:
        while works := self._take():
            self._mono_pass_s = started_s = time.monotonic()
            outcomes = self._compute(works)
            self._mono_pass_s = 0.0
            took_s = time.monotonic() - started_s
            try:
                self._loop.call_soon_threadsafe(self._deliver, works, outcomes, took_s)
            except RuntimeError:  # the loop was closed: the process ends
                return

    def _take(self) -> list[_Work]:
        """The next works that fit into a pass, all of one purpose; empty after the last, once closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if works := self._gather():
                    return works
                if self._closed:
                    return []

    def _gather(self) -> list[_Work]:
        works: list[_Work] = []
        tokens = 0
        while self._queue:
            work = self._queue[0]
            full = tokens + work.tokens > self.pass_tokens
            if works and (full or work.plan.purpose != works[0].plan.purpose):
                break
            self._queue.popleft()
            if not work.future.cancelled():  # its deadline has passed
                works.append(work)
                tokens += work.tokens
        return works

    def _compute(self, works: Sequence[_Work]) -> list[Encoded | Exception]:
        """One outcome a work. If the pass fails, each work runs alone: only the one at fault fails."""
        try:
            sparse = any(work.sparse for work in works)
            vectors, of_texts = embed(self.encoder, merge([work.plan for work in works]), sparse=sparse)
        except Exception as error:
            if len(works) > 1:
                return [outcome for work in works for outcome in self._compute([work])]
            log.error("api.pass_failed", extra={"error": str(error), "texts": works[0].plan.texts})
            return [error]
        stops = np.cumsum([work.plan.texts for work in works]).tolist()
        return [
            Encoded(vectors[start:stop], of_texts and of_texts[start:stop])
            for start, stop in pairwise([0, *stops])
        ]

    # -- the loop's thread again

    def _deliver(
        self, works: Sequence[_Work], outcomes: Sequence[Encoded | Exception], took_s: float
    ) -> None:
        tokens = sum(work.tokens for work in works)
        if took_s > 0:
            self._rate += RATE_WEIGHT * (tokens / took_s - self._rate)
        self._on_batch(len(works), tokens)
        for work, outcome in zip(works, outcomes, strict=True):
            if work.future.done():
                continue
            if isinstance(outcome, Exception):
                work.future.set_exception(ApiError(500, "the model failed on this request"))
            else:
                work.future.set_result(outcome)


def merge(plans: Sequence[Plan]) -> Plan:
    """The texts of several plans of one purpose, in order, as one plan."""
    if len(plans) == 1:
        return plans[0]
    merged = Plan(sum(plan.texts for plan in plans), [], [], [], 0, plans[0].purpose)
    first, truncated = 0, 0
    for plan in plans:
        merged.windows.extend(plan.windows)
        merged.owners.extend(first + owner for owner in plan.owners)
        merged.weights.extend(plan.weights)
        first += plan.texts
        truncated += plan.truncated_tokens
    return Plan(merged.texts, merged.windows, merged.owners, merged.weights, truncated, merged.purpose)


def divide(plan: Plan, tokens: int) -> Iterator[Plan]:
    """A plan in parts of whole texts, in order, of at most ``tokens`` each; a longer text is one part."""
    if sum(map(len, plan.windows)) <= tokens or plan.texts == 1:
        yield plan
        return
    start = filled = 0
    first_text = 0
    truncated = plan.truncated_tokens
    for stop in range(1, len(plan.windows) + 1):
        filled += len(plan.windows[stop - 1])
        at_end = stop == len(plan.windows)
        if not at_end and plan.owners[stop] == plan.owners[stop - 1]:
            continue
        next_tokens = 0 if at_end else _text_tokens(plan, stop)
        if at_end or filled + next_tokens > tokens:
            texts = plan.owners[stop - 1] + 1 - first_text
            owners = [owner - first_text for owner in plan.owners[start:stop]]
            # Counted once, with the first part.
            yield Plan(
                texts, plan.windows[start:stop], owners, plan.weights[start:stop], truncated, plan.purpose
            )
            start, filled, first_text, truncated = stop, 0, first_text + texts, 0


def _text_tokens(plan: Plan, start: int) -> int:
    """Tokens of the text whose first window is at ``start``."""
    stop = start
    while stop < len(plan.owners) and plan.owners[stop] == plan.owners[start]:
        stop += 1
    return sum(map(len, plan.windows[start:stop]))
