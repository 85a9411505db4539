"""Encoder protocol, the base class of the encoders, and a dummy encoder without weights."""

import gc
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from jobworker.worker import report_progress

from .packing import RowLimits, pack, run_batches
from .precision_check import SENTENCES
from .segmenter import Offsets, cut

T = TypeVar("T")
Vectors = NDArray[np.float32]
Purpose = Literal["document", "query"]
LongText = Literal["windows", "truncate", "reject"]
#: `auto`: OpenVINO on a CPU if it is installed and gives the model's vectors, else torch.
Engine = Literal["auto", "openvino", "torch"]

# Padded tokens of one forward pass: the default of text-embeddings-inference, far less than fits into 8 GB.
TOKEN_BUDGET = 16384
# Tokens times dimensions of one forward pass on a CPU: 2048 tokens of MiniLM. Eight times as many leave the
# processor's caches and are slower by a tenth. A model of 1024 dimensions is as fast with 512 tokens as with
# 2048, which take 130 MiB more in every worker.
CPU_PASS_NUMBERS = 2048 * 384
# Rows of one forward pass: bounds the first dimension of the tensors when texts are tiny.
MAX_ROWS = 512


def cpu_budget(token_budget: int, dim: int) -> int:
    """Tokens of one pass on a CPU, padding included; a longer text gets a pass of its own."""
    return min(token_budget, max(1, CPU_PASS_NUMBERS // dim))


class TextTooLong(Exception):
    """Texts longer than the model's window, with `long_text` set to `reject`; `indexes` names the texts."""

    def __init__(self, indexes: Sequence[int], tokens: int, limit: int) -> None:
        super().__init__(f"{len(indexes)} text(s) of up to {tokens} tokens; the model's window holds {limit}")
        self.indexes = tuple(indexes)


@dataclass(frozen=True, slots=True)
class Plan:
    """Tokenised texts, ready for `forward`; the lists have one entry a window, in the order of the texts.

    `windows`: token ids with the model's special tokens. `owners`: the index of the window's text.
    `weights`: tokens of the window without special tokens and prompt, at least 1.
    """

    texts: int
    windows: list[list[int]]
    owners: list[int]
    weights: list[int]
    truncated_tokens: int
    purpose: Purpose


class Encoder(Protocol):
    """Port to an embedding model.

    One thread at a time may call `forward` or `encode`; one at a time, possibly another, `tokenize`.
    """

    name: str
    #: Identifies everything that a vector depends on: the model's files, the engine and its precision.
    revision: str
    dim: int
    #: Tokens of one window, special tokens included.
    max_tokens: int
    #: Running totals: `embedded_tokens` (with special tokens, without padding) and `truncated_tokens`.
    counters: dict[str, int]

    def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
        """Tokenise texts and divide long ones into windows. Raises TextTooLong if `long_text` is `reject`."""

    def forward(self, plan: Plan) -> Vectors:
        """One vector a text, shape (plan.texts, dim), in the order of the texts."""

    def encode(self, texts: Sequence[str], purpose: Purpose = "document") -> Vectors:
        """`tokenize`, then `forward`. Vectors have unit length if the model's configuration says so."""


class Tokens(Protocol):
    """Tokens of one text, without special tokens."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def offsets(self) -> Offsets: ...


class WindowedEncoder(ABC):
    """Base class: windows, their averages, and counters. Subclasses add a tokenizer and a forward pass."""

    name: str
    revision: str
    dim: int
    max_tokens: int

    def __init__(self, long_text: LongText) -> None:
        self.counters = {"embedded_tokens": 0, "truncated_tokens": 0}
        self._long_text = long_text
        self._normalises = True
        self._prefix: list[int] = []
        self._suffix: list[int] = []
        self._row_limits = RowLimits()

    @abstractmethod
    def _tokenize(self, texts: Sequence[str]) -> Sequence[Tokens]:
        """Tokenise without special tokens and without truncation."""

    @abstractmethod
    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        """One vector a window, in order."""

    def _embed_in_batches(
        self, windows: Sequence[list[int]], budget: int, embed: Callable[[list[list[int]]], Any]
    ) -> Vectors:
        """`_embed` in batches of up to `budget` padded tokens, or smaller ones if memory is short."""
        lengths = [len(window) for window in windows]
        batches = run_batches(
            lengths,
            pack(lengths, budget, MAX_ROWS),
            self._row_limits,
            lambda batch: embed([windows[index] for index in batch]),
            self._free_memory,
        )
        # All passes are queued before the first result is read, so that a GPU computes one while the CPU
        # prepares the next.
        parts = list(_reporting(batches))
        arrays = list(_reporting((batch, self._to_numpy(rows)) for batch, rows in parts))
        vectors = np.empty((len(windows), arrays[0][1].shape[1]), np.float32)
        for batch, rows in arrays:
            vectors[batch] = rows
        return vectors

    def _to_numpy(self, rows: Any) -> Vectors:
        """The result of a pass as an array; waits for a device that computes asynchronously."""
        vectors: Vectors = rows
        return vectors

    def _free_memory(self) -> None:
        """Free the memory of a pass that ran out of memory."""
        gc.collect()

    def _prompt(self, purpose: Purpose) -> str:
        """The prefix that the model requires before a text."""
        return ""

    def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
        prompt = self._prompt(purpose)
        prompted = [prompt + text for text in texts] if prompt else texts
        tokens_of = self._tokenize(prompted)
        long = [i for i, tokens in enumerate(tokens_of) if len(tokens.ids) > self._body_limit]
        if long and self._long_text == "reject":
            longest = max(len(tokens_of[index].ids) for index in long)
            raise TextTooLong(long, longest + self.max_tokens - self._body_limit, self.max_tokens)
        prompt_ids = self._tokenize([prompt])[0].ids if prompt and long else []
        plan = Plan(len(texts), [], [], [], self._count_truncated(tokens_of, long), purpose)
        for index, tokens in enumerate(tokens_of):
            self._add_windows(plan, index, prompted[index], tokens, prompt_ids)
        return plan

    def forward(self, plan: Plan) -> Vectors:
        if not plan.texts:
            return np.zeros((0, self.dim), np.float32)
        vectors = merge_windows(self._embed(plan.windows, plan.purpose), plan, normalise=self._normalises)
        self.counters["embedded_tokens"] += sum(map(len, plan.windows))
        self.counters["truncated_tokens"] += plan.truncated_tokens
        return vectors

    def encode(self, texts: Sequence[str], purpose: Purpose = "document") -> Vectors:
        return self.forward(self.tokenize(texts, purpose))

    def probe(self) -> Vectors:
        """Vectors of the sentences of the precision check, one a window; not counted."""
        return self._embed(self.tokenize(SENTENCES).windows, "document")

    @property
    def _body_limit(self) -> int:
        return self.max_tokens - len(self._prefix) - len(self._suffix)

    def _count_truncated(self, tokens_of: Sequence[Tokens], long: Sequence[int]) -> int:
        if self._long_text != "truncate":
            return 0
        return sum(len(tokens_of[index].ids) - self._body_limit for index in long)

    def _add_windows(self, plan: Plan, index: int, text: str, tokens: Tokens, prompt: list[int]) -> None:
        ids = tokens.ids
        if len(ids) <= self._body_limit or self._long_text == "truncate":
            head, ranges = 0, [(0, min(len(ids), self._body_limit))]
        else:
            # Every window starts with the prompt. The tokenizer may have joined the prompt's last token with
            # the first word of the text.
            head = _common_prefix(ids, prompt)
            ranges = cut(text, tokens.offsets[head:], max(1, self._body_limit - head))
        for start, stop in ranges:
            body = ids[:head] + ids[head + start : head + stop]
            plan.windows.append(self._prefix + body + self._suffix)
            plan.owners.append(index)
            plan.weights.append(max(1, stop - start))


def _reporting(passes: Iterable[T]) -> Iterator[T]:
    """Report each pass as progress: one text of some megabytes takes minutes."""
    for one in passes:
        yield one
        report_progress()


def batch_arrays(
    windows: Sequence[list[int]], pad_id: int, *, left: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and attention mask of one batch, shape (windows, longest); `left`: padding in front."""
    longest = max(map(len, windows))
    ids = np.full((len(windows), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, window in enumerate(windows):
        columns = slice(longest - len(window), longest) if left else slice(len(window))
        ids[row, columns] = window
        mask[row, columns] = 1
    return ids, mask


def merge_windows(vectors: Vectors, plan: Plan, *, normalise: bool) -> Vectors:
    """Average the vectors of each text's windows, weighted by tokens: (windows, dim) to (texts, dim).

    `normalise` scales an average to length 1. The vector of a text with one window stays bit-identical.
    """
    if len(plan.windows) == plan.texts:
        return vectors
    owners = np.asarray(plan.owners)
    weights = np.asarray(plan.weights, np.float32)
    share = weights / np.bincount(owners, weights, plan.texts).astype(np.float32)[owners]
    merged = np.zeros((plan.texts, vectors.shape[1]), np.float32)
    np.add.at(merged, owners, vectors * share[:, None])
    if normalise:
        several = np.bincount(owners, minlength=plan.texts) > 1
        merged[several] = _unit_length(merged[several])
    return merged


def _unit_length(vectors: Vectors) -> Vectors:
    # Windows in opposite directions may average to the zero vector, which stays as it is.
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length


class _Characters(NamedTuple):
    ids: list[int]
    offsets: Offsets


class DummyEncoder(WindowedEncoder):
    """Encoder for tests: pseudo-random unit vectors derived from the text; one token a character."""

    def __init__(self, dim: int, *, max_tokens: int = 8192, long_text: LongText = "windows") -> None:
        super().__init__(long_text)
        self.name, self.revision = f"dummy:{dim}", "1"
        self.dim, self.max_tokens = dim, max_tokens

    def _tokenize(self, texts: Sequence[str]) -> Sequence[Tokens]:
        return [
            _Characters(list(map(ord, text)), [(start, start + 1) for start in range(len(text))])
            for text in texts
        ]

    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        seeds = [np.asarray(window, "<u4").tobytes() for window in windows]
        return _unit_length(np.stack([_pseudo_random(seed, self.dim) for seed in seeds]))


def _pseudo_random(seed: bytes, dim: int) -> Vectors:
    numbers = np.frombuffer(hashlib.shake_128(seed).digest(4 * dim), "<u4")
    return (numbers / 2**31 - 1).astype(np.float32)
