"""Texts to vectors: the Encoder protocol, what every encoder shares, and one that needs no weights."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from jobworker.handlers.models import ModelError, default_model, find_model
from jobworker.handlers.segmenter import Offsets, cut

Vectors = NDArray[np.float32]
Purpose = Literal["document", "query"]
LongText = Literal["windows", "truncate", "reject"]

# Padded tokens of one forward pass: text-embeddings-inference's default, far below what 8 GB hold.
TOKEN_BUDGET = 16384


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
    """What handlers ask of a model. Used by one thread at a time."""

    name: str
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

    @abstractmethod
    def _read(self, texts: Sequence[str]) -> Sequence[Tokens]:
        """Tokenise without special tokens and without a limit."""

    @abstractmethod
    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        """One vector a window, in order."""

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


def load_encoder(
    model: str = "",
    device: str = "auto",
    *,
    threads: int = 1,
    long_text: str = "windows",
    token_budget: int = TOKEN_BUDGET,
) -> Encoder:
    """Load a model: a folder, a hub name that is in the cache, `package:<module>` or `dummy:<dim>`.

    Without a name the small model of the extra `embedded` if installed, else bge-m3. Nothing is fetched.
    The same arguments in the same process give the same encoder. Raises ModelError, before anything heavy
    is imported where the model is missing.
    """
    if long_text not in ("windows", "truncate", "reject"):
        raise ModelError(f"long text {long_text!r}: say windows, truncate or reject")
    return _load(model or default_model(), device, threads, long_text, token_budget)


@cache
def _load(model: str, device: str, threads: int, long_text: LongText, token_budget: int) -> Encoder:
    kind, _, rest = model.partition(":")
    if kind == "dummy":
        if not rest.isdecimal() or not int(rest):
            raise ModelError(f"model {model!r}: say dummy:<dimension>, for example dummy:8")
        return DummyEncoder(int(rest), long_text=long_text)
    # Loaded only now: whoever imports this file for the dummy or the protocol pays nothing for torch.
    from jobworker.handlers.torch_encoder import TorchEncoder

    return TorchEncoder.load(
        find_model(model), device=device, threads=threads, long_text=long_text, token_budget=token_budget
    )
