"""How a SentenceTransformer turns a text into tokens, observed while it embeds trial texts.

Many options decide it: route, prompt, length by purpose, side of truncation, chat template and others. They
are not read one by one. What the model itself feeds to its first module is the truth. What cannot be repeated
with a fast tokenizer, fixed special tokens and a window is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .find_model import ModelError
from .packing import is_out_of_memory
from .precision_check import SENTENCES
from .window_format import WindowFormat

# Names of the prompt for stored texts, in the order of sentence-transformers.
PROMPT_NAMES = {"document": ("document", "passage", "corpus"), "query": ("query",)}
# Words of which one at least has a token in the vocabulary of every model.
TRIAL_WORDS = ("a", "一", "1", "the", "#")
# Repetitions of a sentence of about 45 tokens in the texts that show the window.
TRIAL_REPEATS = (15, 250, 5_000)
# Window of a transformer that takes texts of any length; every BERT-like model supports this one.
FALLBACK_WINDOW = 512
# Window of a static model, whose cost grows with the tokens only.
STATIC_WINDOW = 2**20
# Tensors that this engine can make.
PADDED = frozenset(("input_ids", "attention_mask", "token_type_ids"))
FLAT = frozenset(("input_ids", "offsets"))


class _Seen(Exception):
    """Ends an embedding whose input was all that mattered."""


class Observed(NamedTuple):
    """One text on its way through a model: first input, token ids, modules in order, vector."""

    features: dict[str, Any]
    ids: list[int]
    modules: list[Any]
    vector: Any


@dataclass
class ModelInput:
    """Everything between a text of one purpose and the model's first module."""

    #: Own copy of the tokenizer, without truncation and padding.
    tokenizer: Any
    form: WindowFormat
    #: A word with at least one token.
    word: str
    #: A text beyond the window, and what the model keeps of its tokens; None if it has no window.
    truncated: tuple[str, list[int]] | None
    #: Entries of the input that are no tensors, such as the task and the length of the prompt.
    extras: dict[str, Any]
    #: Names of the input's tensors: PADDED or FLAT.
    tensors: frozenset[str]
    #: The modules that such a text passes, in order.
    modules: list[Any]
    pad_id: int
    pads_left: bool

    @property
    def is_flat(self) -> bool:
        """Whether the input is one row of tokens with offsets, without padding and mask."""
        return self.tensors == FLAT


def observe(model: Any, text: str, purpose: str, *, whole: bool = True) -> Observed:
    """Embed one text with `encode_document` or `encode_query`; without `whole`, stop before the first module.

    Raises ModelError with the reason of sentence-transformers.
    """
    encode = model.encode_document if purpose == "document" else model.encode_query
    modules: list[Any] = []
    features: dict[str, Any] = {}

    def before(module: Any, arguments: tuple[Any, ...]) -> None:
        modules.append(module)
        if len(modules) == 1:
            features.update(arguments[0])
            if not whole:
                raise _Seen

    hooks = [part.register_forward_pre_hook(before) for part in _parts(model)]
    vector = None
    try:
        vector = encode([text], show_progress_bar=False)
    except _Seen:
        pass
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"its {encode.__name__} fails ({reason[:300]})") from error
    finally:
        for hook in hooks:
            hook.remove()
    return Observed(features, _ids(features), modules, None if vector is None else _one_row(vector))


def _parts(model: Any) -> list[Any]:
    """The modules of a model; of a router, those of its routes. Each once."""
    parts: dict[int, Any] = {}
    for module in model.children():
        routes = getattr(module, "sub_modules", None)
        steps = [module] if routes is None else [step for route in routes.values() for step in route]
        parts |= {id(step): step for step in steps}
    return list(parts.values())


def _ids(features: Mapping[str, Any]) -> list[int]:
    """Token ids of the only row, without padding."""
    found = features.get("input_ids")
    if found is None or not hasattr(found, "tolist"):
        raise ModelError("its first module takes no token ids (a bag of words, for example)")
    if found.ndim == 1:
        return list(found.tolist())
    mask = features.get("attention_mask")
    kept = found[0] if mask is None else found[0][mask[0].bool()]
    return list(kept.tolist())


def _one_row(vectors: Any) -> Any:
    if getattr(vectors, "ndim", 0) != 2 or not vectors.shape[1]:
        raise ModelError("it gives no vector of fixed length for a text")
    return vectors[0]


def learn_input(model: Any, purpose: str, other: ModelInput | None = None) -> ModelInput:
    """Observe how the model takes texts of a purpose. Raises ModelError with what cannot be repeated.

    `other`: the input of another purpose. Its tokenizer is used again if both have the same first module.
    """
    first = observe(model, TRIAL_WORDS[0], purpose, whole=False).modules[0]
    source = getattr(first, "tokenizer", None)
    shared = other is not None and other.modules[0] is first
    tokenizer = other.tokenizer if other and shared else _copy_tokenizer(first, source)
    prompt = _prompt(model, purpose)
    word, prefix, suffix = _around(model, purpose, tokenizer, prompt)
    seen = observe(model, word, purpose)
    tensors = frozenset(name for name, value in seen.features.items() if hasattr(value, "tolist"))
    if not tensors <= PADDED and tensors != FLAT:
        raise ModelError(f"its input has {', '.join(sorted(tensors - PADDED))}, which is not supported")
    is_flat = tensors == FLAT

    def tokens_of(text: str) -> int:
        return len(tokenizer.encode(prompt + text, add_special_tokens=False).ids) + len(prefix) + len(suffix)

    truncated = _truncated(model, purpose, word, tokens_of)
    return ModelInput(
        tokenizer=tokenizer,
        form=WindowFormat(
            max_tokens=len(truncated[1]) if truncated else STATIC_WINDOW if is_flat else FALLBACK_WINDOW,
            prefix=prefix,
            suffix=suffix,
            prompt=prompt,
            truncates_left=_truncates_left(source),
            normalises=_normalises(seen.modules[-1]),
            embeds_nothing=is_flat,
        ),
        word=word,
        truncated=truncated,
        extras={name: value for name, value in seen.features.items() if name not in tensors},
        tensors=tensors,
        modules=seen.modules,
        pad_id=getattr(source, "pad_token_id", None) or 0,
        pads_left=getattr(source, "padding_side", "right") == "left",
    )


def _normalises(last: Any) -> bool:
    output = getattr(last, "module_output_name", "sentence_embedding")
    return type(last).__name__ == "Normalize" and output == "sentence_embedding"


def _prompt(model: Any, purpose: str) -> str:
    """The prompt that sentence-transformers takes: the first one named, even an empty one, or the default."""
    prompts: dict[str, str] = model.prompts
    for name in PROMPT_NAMES[purpose]:
        if name in prompts:
            return prompts[name] or ""
    return prompts.get(model.default_prompt_name or "") or ""


def _copy_tokenizer(module: Any, source: Any) -> Any:
    from tokenizers import Tokenizer

    backend = source if isinstance(source, Tokenizer) else getattr(source, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"its first module, {type(module).__name__}, has the tokenizer {type(source).__name__} "
            "instead of a fast tokenizer (tokenizer.json)"
        )
    try:
        own = Tokenizer.from_str(backend.to_str())
    except Exception as error:
        raise ModelError(f"its tokenizer cannot be saved as tokenizer.json ({error})") from error
    own.no_truncation()
    own.no_padding()
    return own


def _truncates_left(source: Any) -> bool:
    own = getattr(source, "truncation", None) or {}
    return "left" in (getattr(source, "truncation_side", ""), str(own.get("direction", "")).lower())


def _around(model: Any, purpose: str, tokenizer: Any, prompt: str) -> tuple[str, list[int], list[int]]:
    """A word with at least one token, and the special tokens before and after every text."""
    for word in TRIAL_WORDS:
        if not tokenizer.encode(word, add_special_tokens=False).ids:
            continue
        body = tokenizer.encode(prompt + word, add_special_tokens=False).ids
        ids = observe(model, word, purpose, whole=False).ids
        starts = [at for at in range(len(ids) - len(body) + 1) if ids[at : at + len(body)] == body]
        if starts:
            return word, ids[: starts[0]], ids[starts[0] + len(body) :]
        if len(ids) <= max(2, len(body)):
            raise ModelError(
                f"its window of {len(ids)} tokens has no room for a text beside prompt and special tokens"
            )
        raise ModelError("it changes texts before they are tokenised (a chat template, for example)")
    raise ModelError("its tokenizer has no token for any of " + " ".join(TRIAL_WORDS))


def _truncated(
    model: Any, purpose: str, word: str, tokens_of: Callable[[str], int]
) -> tuple[str, list[int]] | None:
    """A text that is too long for the model, and the token ids that the model keeps; None if it keeps all."""
    for repeats in TRIAL_REPEATS:
        text = f"{word} {SENTENCES[-1]} " * repeats
        kept = observe(model, text, purpose, whole=False).ids
        if len(kept) < tokens_of(text):
            return text, kept
    return None
