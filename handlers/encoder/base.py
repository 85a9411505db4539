"""Encoder protocol, the base class of the encoders, and a dummy encoder without weights."""

import gc
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from jobworker.worker import report_progress

from ..sparse_vector import SparseVector
from .packing import RowLimits, pack, run_batches
from .precision_check import SENTENCES
from .segmenter import Offsets, cut
from .sparse_head import sparse_vectors
from .window_format import WindowFormat

T = TypeVar("T")
Vectors = NDArray[np.float32]
Purpose = Literal["document", "query"]
LongText = Literal["windows", "truncate", "reject"]
#: `auto`: OpenVINO on a CPU if it is installed and gives the model's vectors, else torch.
Engine = Literal["auto", "openvino", "torch"]

# Padded tokens of one forward pass: the default of text-embeddings-inference, far less than fits into 8 GB.
TOKEN_BUDGET = 65536
# Tokens times dimensions of one forward pass on a CPU: 2048 tokens of MiniLM. Eight times as many leave the
# processor's caches and are slower by a tenth. A model of 1024 dimensions is as fast with 512 tokens as with
# 2048, which take 130 MiB more in every worker.
CPU_PASS_NUMBERS = 2048 * 384
# Rows of one forward pass: bounds the first dimension of the tensors when texts are tiny.
MAX_ROWS = 512

_SURROGATE = re.compile("[\ud800-\udfff]")


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and unpaired ones replaced by U+FFFD; tokenizers refuse both."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def cpu_budget(token_budget: int, dim: int) -> int:
    """Tokens of one pass on a CPU, padding included; a longer text gets a pass of its own."""
    return min(token_budget, max(1, CPU_PASS_NUMBERS // dim))


class UnsuitableText(Exception):
    """Texts that this model cannot embed; `indexes` names the texts."""

    def __init__(self, message: str, indexes: Sequence[int]) -> None:
        super().__init__(message)
        self.indexes = tuple(indexes)


class TextTooLong(UnsuitableText):
    """Texts longer than the model's window, with `long_text` set to `reject`."""

    def __init__(self, indexes: Sequence[int], tokens: int, limit: int) -> None:
        message = f"{len(indexes)} text(s) of up to {tokens} tokens; the model's window holds {limit}"
        super().__init__(message, indexes)


class TextWithoutTokens(UnsuitableText):
    """Texts, such as the empty one, that have no token for a model without special tokens."""

    def __init__(self, indexes: Sequence[int]) -> None:
        message = f"{len(indexes)} text(s) without a token: the model cannot embed an empty text"
        super().__init__(message, indexes)


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


class Encoded(NamedTuple):
    """Vectors of texts, shape (texts, dim), and their sparse vectors; None if they were not asked for."""

    vectors: Vectors
    sparse: list[SparseVector] | None


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
    #: Token of unknown words and characters; None if the tokenizer has none.
    unknown_id: int | None
    #: Whether the model gives sparse vectors too.
    has_sparse: bool
    #: Running totals: `embedded_tokens` (with special tokens, without padding) and `truncated_tokens`.
    counters: dict[str, float]

    @property
    def pass_tokens(self) -> int:
        """Tokens of one pass, padding included."""

    def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
        """Tokenise texts and divide long ones into windows.

        Raises TextTooLong if `long_text` is `reject`, and TextWithoutTokens.
        """

    def forward(self, plan: Plan) -> Vectors:
        """One vector a text, shape (plan.texts, dim), in the order of the texts."""

    def forward_both(self, plan: Plan) -> Encoded:
        """As `forward`, with the sparse vectors of the same pass; only if `has_sparse`."""

    def encode(self, texts: Sequence[str], purpose: Purpose = "document") -> Vectors:
        """`tokenize`, then `forward`. A text of one window gets what `SentenceTransformer.encode_document`
        (or `encode_query`) gives; the vector has unit length if the model normalises."""


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
    unknown_id: int | None = None
    has_sparse = False

    def __init__(self, long_text: LongText) -> None:
        self.counters: dict[str, float] = {"embedded_tokens": 0, "truncated_tokens": 0}
        self._long_text = long_text
        self._formats: dict[Purpose, WindowFormat] = {}
        #: Special tokens, which have no weight in a sparse vector.
        self._dropped: frozenset[int] = frozenset()
        #: Tokens of one pass.
        self._budget = TOKEN_BUDGET
        #: Whether padding would change the vectors, so that all windows of a batch have the same length.
        self._equal_lengths = False
        self._row_limits = RowLimits()

    @property
    def pass_tokens(self) -> int:
        """Tokens of one pass, padding included."""
        return self._budget

    @abstractmethod
    def _tokenize(self, texts: Sequence[str], purpose: Purpose) -> Sequence[Tokens]:
        """Tokenise without special tokens and without truncation."""

    @abstractmethod
    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        """One vector a window, in order."""

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """The indices of windows of these lengths, grouped into passes."""
        return pack(lengths, self._budget, MAX_ROWS, equal_lengths=self._equal_lengths)

    def _embed_both(
        self, windows: Sequence[list[int]], purpose: Purpose
    ) -> tuple[Vectors, NDArray[np.float32]]:
        """As `_embed`, and the weight of each token of all windows in order; only if `has_sparse`."""
        raise NotImplementedError

    def _embed_in_batches(
        self, windows: Sequence[list[int]], embed: Callable[[list[list[int]]], Any]
    ) -> Vectors:
        """`_embed` in the batches of `_batches`, or smaller ones if memory is short."""
        arrays = self._in_batches(windows, embed, self._to_numpy)
        vectors = np.empty((len(windows), arrays[0][1].shape[1]), np.float32)
        for batch, rows in arrays:
            vectors[batch] = rows
        return vectors

    def _embed_both_in_batches(
        self, windows: Sequence[list[int]], embed: Callable[[list[list[int]]], tuple[Any, Any]]
    ) -> tuple[Vectors, NDArray[np.float32]]:
        """`_embed_both` in such batches. `embed` gives vectors, and weights of tokens: flat in the order of
        the windows, or padded as `batch_arrays` pads."""
        arrays = self._in_batches(windows, embed, self._both_to_numpy)
        vectors = np.empty((len(windows), arrays[0][1][0].shape[1]), np.float32)
        weights: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(windows)
        for batch, (rows, of_tokens) in arrays:
            vectors[batch] = rows
            parts = _by_window(of_tokens, [len(windows[index]) for index in batch], left=self._pads_left)
            for index, part in zip(batch, parts, strict=True):
                weights[index] = part
        return vectors, np.concatenate(weights)

    @property
    def _pads_left(self) -> bool:
        """Whether the padding is in front."""
        return False

    def _both_to_numpy(self, both: tuple[Any, Any]) -> tuple[Vectors, NDArray[np.float32]]:
        return self._to_numpy(both[0]), self._to_numpy(both[1])

    def _in_batches(
        self,
        windows: Sequence[list[int]],
        embed: Callable[[list[list[int]]], Any],
        to_numpy: Callable[[Any], T],
    ) -> list[tuple[list[int], T]]:
        """Indices of the windows of each batch, and its result."""
        lengths = [len(window) for window in windows]
        batches = run_batches(
            lengths,
            self._batches(lengths),
            self._row_limits,
            lambda batch: embed([windows[index] for index in batch]),
            self._free_memory,
        )
        # All passes are queued before the first result is read, so that a GPU computes one while the CPU
        # prepares the next.
        parts = list(_reporting(batches))
        return list(_reporting((batch, to_numpy(result)) for batch, result in parts))

    def _to_numpy(self, rows: Any) -> Vectors:
        """The result of a pass as an array; waits for a device that computes asynchronously."""
        vectors: Vectors = rows
        return vectors

    def _free_memory(self) -> None:
        """Free the memory of a pass that ran out of memory."""
        gc.collect()

    def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
        plan = self._plan(texts, purpose, self._long_text)
        empty = [owner for window, owner in zip(plan.windows, plan.owners, strict=True) if not window]
        if empty and not self._formats[purpose].embeds_nothing:
            raise TextWithoutTokens(empty)
        return plan

    def _plan(self, texts: Sequence[str], purpose: Purpose, long_text: LongText) -> Plan:
        form = self._formats[purpose]
        prompted = [form.prompt + without_surrogates(text) for text in texts]
        tokens_of = self._tokenize(prompted, purpose)
        long = [i for i, tokens in enumerate(tokens_of) if len(tokens.ids) > form.body_limit]
        if long and long_text == "reject":
            longest = max(len(tokens_of[index].ids) for index in long)
            raise TextTooLong(long, longest + form.max_tokens - form.body_limit, form.max_tokens)
        truncates = long_text == "truncate"
        lost = sum(len(tokens_of[index].ids) - form.body_limit for index in long) if truncates else 0
        prompt = self._tokenize([form.prompt], purpose)[0].ids if form.prompt and long else []
        plan = Plan(len(texts), [], [], [], lost, purpose)
        for index, tokens in enumerate(tokens_of):
            kept = form.truncate(tokens.ids)
            whole = truncates or len(kept) == len(tokens.ids)
            bodies = (
                [(kept, len(kept))] if whole else _divide(prompted[index], tokens, prompt, form.body_limit)
            )
            for body, weight in bodies:
                plan.windows.append(form.window(body))
                plan.owners.append(index)
                plan.weights.append(max(1, weight))
        return plan

    def forward(self, plan: Plan) -> Vectors:
        if not plan.texts:
            return np.zeros((0, self.dim), np.float32)
        return self._merged(self._embed(plan.windows, plan.purpose), plan)

    def forward_both(self, plan: Plan) -> Encoded:
        if not plan.texts:
            return Encoded(np.zeros((0, self.dim), np.float32), [])
        windows, weights = self._embed_both(plan.windows, plan.purpose)
        sparse = sparse_vectors(plan.windows, plan.owners, weights, self._dropped, plan.texts)
        return Encoded(self._merged(windows, plan), sparse)

    def _merged(self, windows: Vectors, plan: Plan) -> Vectors:
        """Vectors of texts from those of their windows; counts the tokens."""
        normalises = self._formats[plan.purpose].normalises
        vectors = self._finish(merge_windows(windows, plan, normalise=normalises), plan.purpose)
        self.counters["embedded_tokens"] += sum(map(len, plan.windows))
        self.counters["truncated_tokens"] += plan.truncated_tokens
        return vectors

    def _finish(self, vectors: Vectors, purpose: Purpose) -> Vectors:
        """Length 1 also in half precision, then the dimensions that the model keeps (`truncate_dim`)."""
        if self._formats[purpose].normalises:
            vectors = _unit_length(vectors)
        return vectors if vectors.shape[1] == self.dim else np.ascontiguousarray(vectors[:, : self.dim])

    def encode(self, texts: Sequence[str], purpose: Purpose = "document") -> Vectors:
        return self.forward(self.tokenize(texts, purpose))

    def probe(self) -> Vectors:
        """Vectors of the sentences of the precision check, one a window; not counted."""
        return self._embed(self._probe_windows(), "document")

    def _probe_windows(self) -> list[list[int]]:
        return [window for window in self._plan(SENTENCES, "document", "windows").windows if window]


def _divide(text: str, tokens: Tokens, prompt: list[int], limit: int) -> list[tuple[list[int], int]]:
    """Tokens of each window, at most `limit`, with the number of them that are not the prompt's."""
    ids = tokens.ids
    # Every window starts with the prompt. The tokenizer may have joined the prompt's last token with the
    # first word of the text.
    head = _common_prefix(ids, prompt)
    ranges = cut(text, tokens.offsets[head:], max(1, limit - head))
    return [(ids[:head] + ids[head + start : head + stop], stop - start) for start, stop in ranges]


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


def _by_window(
    weights: NDArray[np.float32], lengths: Sequence[int], *, left: bool
) -> Sequence[NDArray[np.float32]]:
    """The weights of the tokens of each window, from a flat array or a padded one."""
    if weights.ndim == 1:
        return np.split(weights, np.cumsum(lengths)[:-1])
    return [row[-length:] if left else row[:length] for row, length in zip(weights, lengths, strict=True)]


def embed(encoder: Encoder, plan: Plan, *, sparse: bool) -> Encoded:
    """Vectors of a plan; with `sparse` also the sparse ones, if the model gives them."""
    if sparse and encoder.has_sparse:
        return encoder.forward_both(plan)
    return Encoded(encoder.forward(plan), None)


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
        self._formats = dict.fromkeys(
            get_args(Purpose), WindowFormat(max_tokens=max_tokens, embeds_nothing=True)
        )

    def _tokenize(self, texts: Sequence[str], purpose: Purpose) -> Sequence[Tokens]:
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
