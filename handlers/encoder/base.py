"""Texts to vectors: the Encoder protocol, what every encoder shares, and one that needs no weights."""

import gc
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .packing import Ceilings, pack, run_batches
from .precision_check import SENTENCES
from .segmenter import Offsets, cut

Vectors = NDArray[np.float32]
Purpose = Literal["document", "query"]
LongText = Literal["windows", "truncate", "reject"]
#: `auto` takes OpenVINO on a CPU where it is installed and gives the model's vectors, else torch.
Engine = Literal["auto", "openvino", "torch"]

# Padded tokens of one forward pass: text-embeddings-inference's default, far below what 8 GB hold.
TOKEN_BUDGET = 16384
# Tokens times dimensions of a pass on a CPU, 2048 tokens of MiniLM: eight times as many leave the caches, and
# it is slower by a tenth. A model of 1024 dimensions is as fast with 512 tokens as with 2048, and these take
# 130 MiB more in every worker.
CPU_PASS_NUMBERS = 2048 * 384
# Rows of one forward pass: keeps the largest tensor's first dimension modest when texts are tiny.
MAX_ROWS = 512


def cpu_budget(token_budget: int, dim: int) -> int:
    """Tokens of one pass on a CPU, padding included; a longer text goes alone."""
    return min(token_budget, max(1, CPU_PASS_NUMBERS // dim))


class TextTooLong(Exception):
    """Texts longer than the model's window where `long_text` is `reject`; `indexes` says which."""

    def __init__(self, indexes: Sequence[int], tokens: int, limit: int) -> None:
        super().__init__(f"{len(indexes)} text(s) of up to {tokens} tokens; the model's window holds {limit}")
        self.indexes = tuple(indexes)


@dataclass(frozen=True, slots=True)
class Plan:
    """Tokenised texts, ready for `forward`: one entry a window, the windows of one text side by side.

    `windows` are token ids with the model's special tokens, `owners` the index of each window's text,
    `weights` its own tokens (special ones and prompt not counted, at least 1).
    """

    texts: int
    windows: list[list[int]]
    owners: list[int]
    weights: list[int]
    truncated_tokens: int
    purpose: Purpose


class Encoder(Protocol):
    """What handlers ask of a model.

    `forward` and `encode` are for one thread at a time; `tokenize` for one too, which may be another.
    """

    name: str
    #: Changes with all that a vector depends on: the model's files, the engine and its arithmetic.
    revision: str
    dim: int
    #: Tokens of one window, special ones included.
    max_tokens: int
    #: Running totals: `embedded_tokens` (special ones included, padding not) and `truncated_tokens`.
    counters: dict[str, int]

    def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
        """Tokenise once and cut what is too long. Raises TextTooLong where such texts are to be rejected."""

    def forward(self, plan: Plan) -> Vectors:
        """Return one vector a text, shape (plan.texts, dim), in the order of the texts."""

    def encode(self, texts: Sequence[str], purpose: Purpose = "document") -> Vectors:
        """`forward` of `tokenize`; unit length where the model's own configuration says so."""


class Tokens(Protocol):
    """What a tokenizer made of one text, special tokens not included."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def offsets(self) -> Offsets: ...


class WindowedEncoder(ABC):
    """Windows, averages and counters; those that inherit bring a tokenizer and a forward pass."""

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
        self._ceilings = Ceilings()

    @abstractmethod
    def _read(self, texts: Sequence[str]) -> Sequence[Tokens]:
        """Tokenise without special tokens and without a limit."""

    @abstractmethod
    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        """One vector a window, in order."""

    def _embed_packed(
        self, windows: Sequence[list[int]], budget: int, embed: Callable[[list[list[int]]], Any]
    ) -> Vectors:
        """`_embed` by batches of up to `budget` padded tokens, or smaller ones where memory is short."""
        lengths = [len(window) for window in windows]
        batches = run_batches(
            lengths,
            pack(lengths, budget, MAX_ROWS),
            self._ceilings,
            lambda batch: embed([windows[index] for index in batch]),
            self._release,
        )
        # All are begun before the first is looked at: a GPU computes one while the next is made ready.
        parts = [(batch, self._fetched(rows)) for batch, rows in list(batches)]
        vectors = np.empty((len(windows), parts[0][1].shape[1]), np.float32)
        for batch, rows in parts:
            vectors[batch] = rows
        return vectors

    def _fetched(self, rows: Any) -> Vectors:
        """What `embed` has returned for a batch, once it is there."""
        fetched: Vectors = rows
        return fetched

    def _release(self) -> None:
        """Give back what a pass left that memory did not hold."""
        gc.collect()

    def _prompt(self, purpose: Purpose) -> str:
        """What the model wants before a text."""
        return ""

    def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
        """See `Encoder.tokenize`."""
        prompt = self._prompt(purpose)
        prompted = [prompt + text for text in texts] if prompt else texts
        read = self._read(prompted)
        long = [i for i, tokens in enumerate(read) if len(tokens.ids) > self._room]
        if long and self._long_text == "reject":
            most = max(len(read[index].ids) for index in long)
            raise TextTooLong(long, most + self.max_tokens - self._room, self.max_tokens)
        prompt_ids = self._read([prompt])[0].ids if prompt and long else []
        plan = Plan(len(texts), [], [], [], self._count_truncated(read, long), purpose)
        for index, tokens in enumerate(read):
            self._add_windows(plan, index, prompted[index], tokens, prompt_ids)
        return plan

    def forward(self, plan: Plan) -> Vectors:
        """See `Encoder.forward`."""
        if not plan.texts:
            return np.zeros((0, self.dim), np.float32)
        vectors = merge_windows(self._embed(plan.windows, plan.purpose), plan, unit=self._normalises)
        self.counters["embedded_tokens"] += sum(map(len, plan.windows))
        self.counters["truncated_tokens"] += plan.truncated_tokens
        return vectors

    def encode(self, texts: Sequence[str], purpose: Purpose = "document") -> Vectors:
        """See `Encoder.encode`."""
        return self.forward(self.tokenize(texts, purpose))

    def probe(self) -> Vectors:
        """Vectors of the sentences of the self-check, one a window; counted nowhere."""
        return self._embed(self.tokenize(SENTENCES).windows, "document")

    @property
    def _room(self) -> int:
        return self.max_tokens - len(self._prefix) - len(self._suffix)

    def _count_truncated(self, read: Sequence[Tokens], long: Sequence[int]) -> int:
        if self._long_text != "truncate":
            return 0
        return sum(len(read[index].ids) - self._room for index in long)

    def _add_windows(self, plan: Plan, index: int, text: str, tokens: Tokens, prompt: list[int]) -> None:
        ids = tokens.ids
        if len(ids) <= self._room or self._long_text == "truncate":
            head, ranges = 0, [(0, min(len(ids), self._room))]
        else:
            # Every window carries the prompt; its last token may have grown into the text's first word.
            head = _common_prefix(ids, prompt)
            ranges = cut(text, tokens.offsets[head:], max(1, self._room - head))
        for start, stop in ranges:
            body = ids[:head] + ids[head + start : head + stop]
            plan.windows.append(self._prefix + body + self._suffix)
            plan.owners.append(index)
            plan.weights.append(max(1, stop - start))


def batch_arrays(
    windows: Sequence[list[int]], pad_id: int, *, left: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and attention mask of one batch, shape (windows, longest); `left`: padding comes first."""
    longest = max(map(len, windows))
    ids = np.full((len(windows), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, window in enumerate(windows):
        place = slice(longest - len(window), longest) if left else slice(len(window))
        ids[row, place] = window
        mask[row, place] = 1
    return ids, mask


def merge_windows(vectors: Vectors, plan: Plan, *, unit: bool) -> Vectors:
    """Average the vectors of each text's windows, shape (windows, dim), by their tokens: (texts, dim).

    With `unit` an average is brought back to length 1. A text of one window keeps its vector bit for bit.
    """
    if len(plan.windows) == plan.texts:
        return vectors
    owners = np.asarray(plan.owners)
    weights = np.asarray(plan.weights, np.float32)
    share = weights / np.bincount(owners, weights, plan.texts).astype(np.float32)[owners]
    merged = np.zeros((plan.texts, vectors.shape[1]), np.float32)
    np.add.at(merged, owners, vectors * share[:, None])
    if unit:
        several = np.bincount(owners, minlength=plan.texts) > 1
        merged[several] = _unit(merged[several])
    return merged


def _unit(vectors: Vectors) -> Vectors:
    # Windows that point in opposite directions may add up to nothing: that stays the zero vector.
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
    """Unit vectors that depend on nothing but the text, one token a character: for tests, no weights."""

    def __init__(self, dim: int, *, max_tokens: int = 8192, long_text: LongText = "windows") -> None:
        super().__init__(long_text)
        self.name, self.revision = f"dummy:{dim}", "1"
        self.dim, self.max_tokens = dim, max_tokens

    def _read(self, texts: Sequence[str]) -> Sequence[Tokens]:
        return [
            _Characters(list(map(ord, text)), [(place, place + 1) for place in range(len(text))])
            for text in texts
        ]

    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        return _unit(np.stack([_noise(np.asarray(window, "<u4").tobytes(), self.dim) for window in windows]))


def _noise(data: bytes, dim: int) -> Vectors:
    numbers = np.frombuffer(hashlib.shake_128(data).digest(4 * dim), "<u4")
    return (numbers / 2**31 - 1).astype(np.float32)
