"""Tiny random models: one for each module type and option of sentence-transformers that decides a vector."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tiny_models import HIDDEN, tiny_model, tiny_tokenizer

Build = Callable[[Path], Any]
#: A card is text for a hub; writing one takes as long as the model itself.
NO_CARD: Any = {"create_model_card": False}
PROMPTS = {"query": "query: ", "document": "passage: "}


def _modules() -> Any:
    """The classes of modules by their old name, which models on disk use; its first import warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from sentence_transformers import models

    return models


def edit(folder: Path, name: str, **values: Any) -> None:
    """Set keys of a JSON file; None removes a key."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def bert(**options: Any) -> Build:
    return lambda folder: tiny_model(folder, "bert", **options)


def edited(name: str, kind: str = "bert", *, options: dict[str, Any] | None = None, **values: Any) -> Build:
    """A tiny model with keys of one of its files set."""

    def build(folder: Path) -> None:
        tiny_model(folder, kind, **(options or {}))
        edit(folder, name, **values)

    return build


def with_config(**values: Any) -> Build:
    return edited("config_sentence_transformers.json", options={"prompts": PROMPTS}, **values)


def architecture(
    name: str, *, tokens: str = "bert", pooling: str = "mean", head: str = "", **config: Any
) -> Build:
    """A transformer of another architecture, with random weights; with a `head`, it has no modules.json."""

    def build(folder: Path) -> None:
        import torch
        import transformers

        tiny_model(folder, "bert", pooling=pooling)
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        tokenizer = tiny_tokenizer(tokens)
        base = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id or 0}
        torch.manual_seed(3)
        settings = getattr(transformers, f"{name}Config")(**base, **config)
        with_encoder = getattr(transformers, f"{name}EncoderModel", None)
        made = with_encoder or getattr(transformers, f"{name}{head or 'Model'}")
        made(settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if head:
            (folder / "modules.json").unlink()

    return build


SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.5,
}
LLAMA = {
    **SIZES,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DYNAMIC = {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}


def special_tokens(single: str) -> Build:
    """A model whose tokenizer puts other special tokens around a text, or none."""

    def build(folder: Path) -> None:
        from tokenizers.processors import TemplateProcessing

        tiny_model(folder, "bert")
        tokenizer = tiny_tokenizer("bert")
        names = [name for name in ("[CLS]", "[SEP]") if name in single]
        ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
        tokenizer.save_pretrained(folder)

    return build


def tokenizer_option(**values: Any) -> Build:
    return edited("tokenizer_config.json", **values)


def modules(*make: Callable[[], Any], **options: Any) -> Build:
    """A model whose modules are made one by one and saved by sentence-transformers itself."""

    def build(folder: Path) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.manual_seed(5)
        SentenceTransformer(modules=[one() for one in make], device="cpu", **options).save(
            str(folder), **NO_CARD
        )

    return build


def transformer(kind: str = "bert", **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import tempfile

        models = _modules()

        with tempfile.TemporaryDirectory() as folder:
            tiny_model(Path(folder) / "t", kind)
            return models.Transformer(str(Path(folder) / "t"), **{"max_seq_length": 24, **options})

    return make


def part(name: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    """A module by its class in `sentence_transformers.models`."""

    def make() -> Any:
        models = _modules()

        return getattr(models, name)(*arguments, **options)

    return make


POOLING = part("Pooling", HIDDEN)
NORMALIZE = part("Normalize")


def static(*, truncation: int = 0, direction: str = "right") -> Callable[[], Any]:
    def make() -> Any:
        models = _modules()

        tokenizer = tiny_tokenizer("bert").backend_tokenizer
        if truncation:
            tokenizer.enable_truncation(truncation, direction=direction)
        return models.StaticEmbedding(tokenizer, embedding_dim=HIDDEN)

    return make


def words(name: str = "WordEmbeddings") -> Callable[[], Any]:
    def make() -> Any:
        import numpy as np

        models = _modules()
        from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

        vocabulary = ["the", "petrel", "came", "back"]
        if name == "BoW":
            return models.BoW(vocabulary)
        table = np.random.default_rng(1).normal(size=(len(vocabulary), HIDDEN)).astype(np.float32)
        return models.WordEmbeddings(WhitespaceTokenizer(vocabulary), table)

    return make


def router(
    query: list[Callable[[], Any]], document: list[Callable[[], Any]], **options: Any
) -> Callable[[], Any]:
    def make() -> Any:
        models = _modules()

        return models.Router.for_query_document(
            query_modules=[one() for one in query], document_modules=[one() for one in document], **options
        )

    return make


def layer_pooling() -> Any:
    models = _modules()

    return models.WeightedLayerPooling(HIDDEN, num_hidden_layers=2, layer_start=1)


BERT_ROUTE = [transformer(), POOLING]
XLM_ROUTE = [transformer("xlm-r"), POOLING, NORMALIZE]

CHAT = "{% for one in messages %}{{ 'query ' + one['content'] + ' passage' }}{% endfor %}"


def chat_template(**options: Any) -> Build:
    """A model that wraps texts in a chat template, as sentence-transformers saves it."""

    def build(folder: Path) -> None:
        from sentence_transformers import SentenceTransformer

        bare(folder)
        tokenizer = tiny_tokenizer("bert")
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
        SentenceTransformer(str(folder), device="cpu", **options).save(str(folder), **NO_CARD)

    return build


#: Models whose vectors must be those of sentence-transformers.
COMPUTED: dict[str, Build] = {
    "mean": bert(),
    "cls, not normalised": bert(pooling="cls", normalise=False),
    **{
        pooling: modules(transformer(), part("Pooling", HIDDEN, pooling_mode=pooling))
        for pooling in ("max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    },
    "two poolings": modules(transformer(), part("Pooling", HIDDEN, pooling_mode=("mean", "max")), NORMALIZE),
    "dense": modules(transformer(), POOLING, part("Dense", HIDDEN, 12), NORMALIZE),
    "dense after normalize": modules(transformer(), POOLING, NORMALIZE, part("Dense", HIDDEN, 12)),
    "layer norm": modules(transformer(), POOLING, part("LayerNorm", HIDDEN), part("Dropout")),
    "weighted layers": modules(
        transformer(config_args={"output_hidden_states": True}), layer_pooling, POOLING
    ),
    "cnn": modules(transformer(), part("CNN", HIDDEN, 8), part("Pooling", 24)),
    "cnn over one token": modules(transformer(), part("CNN", HIDDEN, 8, [1]), part("Pooling", 8)),
    "static": modules(static()),
    "static, normalised": modules(static(), NORMALIZE),
    "static, truncated": modules(static(truncation=5)),
    "static, truncated left": modules(static(truncation=5, direction="left")),
    "static, dense": modules(static(), part("Dense", HIDDEN, 12)),
    "router": modules(router(BERT_ROUTE, XLM_ROUTE)),
    "router, default query": modules(router(BERT_ROUTE, XLM_ROUTE, default_route="query")),
    "router, other order": modules(router(XLM_ROUTE, BERT_ROUTE)),
    "router, static queries": modules(router([static()], BERT_ROUTE)),
    "router, static documents": modules(router(BERT_ROUTE, [static()])),
    "router, then normalize": modules(router(BERT_ROUTE, [transformer("xlm-r"), POOLING]), NORMALIZE),
    "bare": lambda folder: bare(folder),
    "chat template": chat_template(),
    "no pooler": lambda folder: broken(drop("pooler"))(folder),
    "normalised beside": modules(transformer(), POOLING, part("Normalize", "sentence_embedding", "other")),
    "normalised tokens": modules(transformer(), part("Normalize", "token_embeddings"), POOLING),
    "truncate_dim, negative": with_config(truncate_dim=-4),
    "fnet": architecture("FNet", **SIZES, max_position_embeddings=40),
    "xlnet": architecture("XLNet", d_model=HIDDEN, n_layer=2, n_head=4, d_inner=64),
    "bloom": architecture("Bloom", pooling="weightedmean", hidden_size=HIDDEN, n_layer=2, n_head=4),
    "bf16": bert(dtype="bfloat16"),
    "prompts": bert(prompts=PROMPTS),
    "prompt of passages": bert(prompts={"query": "query: ", "passage": "passage: "}),
    "prompts left out": bert(prompts=PROMPTS, include_prompt=False),
    "default prompt": with_config(default_prompt_name="query"),
    "default prompt beside an empty one": with_config(
        prompts={"query": "query: ", "document": ""}, default_prompt_name="query"
    ),
    "default prompt alone": with_config(prompts={"own": "passage: "}, default_prompt_name="own"),
    "truncate_dim": with_config(truncate_dim=8),
    "truncate_dim, larger": with_config(truncate_dim=100),
    "document_length": edited("sentence_bert_config.json", document_length=9),
    "document_length, longer": edited("sentence_bert_config.json", document_length=36),
    "query_length": edited("sentence_bert_config.json", query_length=9),
    "max_length of processing": edited(
        "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 10}}
    ),
    "no special tokens by processing": edited(
        "sentence_bert_config.json", processing_kwargs={"text": {"add_special_tokens": False}}
    ),
    "padded to a length": edited(
        "sentence_bert_config.json", processing_kwargs={"text": {"padding": "max_length"}}
    ),
    "lower case": edited("sentence_bert_config.json", do_lower_case=True),
    "truncation left": tokenizer_option(truncation_side="left"),
    "truncation left, prompt": edited(
        "tokenizer_config.json", options={"prompts": PROMPTS}, truncation_side="left"
    ),
    "padding left": tokenizer_option(padding_side="left"),
    "padding left, xlm-r": edited("tokenizer_config.json", "xlm-r", padding_side="left"),
    "no window stated": edited("sentence_bert_config.json", max_seq_length=None),
    "no window stated, xlm-r": edited("sentence_bert_config.json", "xlm-r", max_seq_length=None),
    "window beyond positions": edited("sentence_bert_config.json", max_seq_length=100),
    "window beyond positions, xlm-r": edited("sentence_bert_config.json", "xlm-r", max_seq_length=100),
    "window of four": bert(window=4),
    "window of nine": bert(window=9),
    "no special tokens": special_tokens("$A"),
    "no special tokens, window of three": lambda folder: (
        special_tokens("$A")(folder),
        edit(folder, "sentence_bert_config.json", max_seq_length=3),
    ),
    "end token only": special_tokens("$A [SEP]"),
    "start token only": special_tokens("[CLS] $A"),
    "token twice": special_tokens("[CLS] [CLS] $A [SEP]"),
    "roberta": architecture("Roberta", tokens="xlm-r", **SIZES, max_position_embeddings=40),
    "distilbert": architecture(
        "DistilBert", dim=HIDDEN, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40
    ),
    "mpnet": architecture("MPNet", tokens="xlm-r", **SIZES, max_position_embeddings=40),
    "electra": architecture("Electra", **SIZES, embedding_size=16, max_position_embeddings=40),
    "albert": architecture("Albert", **SIZES, embedding_size=16, max_position_embeddings=40),
    "modernbert": architecture(
        "ModernBert", **SIZES, max_position_embeddings=40, cls_token_id=2, sep_token_id=3,
        bos_token_id=2, eos_token_id=3,
    ),
    "deberta": architecture(
        "DebertaV2", **SIZES, max_position_embeddings=40, relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    "t5": architecture("T5", d_model=HIDDEN, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    "gpt2": architecture("GPT2", pooling="lasttoken", n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=40),
    "gpt2, padding left": lambda folder: (
        architecture("GPT2", pooling="lasttoken", n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=40)(folder),
        edit(folder, "tokenizer_config.json", padding_side="left"),
    ),
    "opt": architecture(
        "OPT", hidden_size=HIDDEN, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, word_embed_proj_dim=HIDDEN,
    ),
    "llama": architecture("Llama", pooling="lasttoken", **LLAMA),
    "qwen3, padding left": lambda folder: (
        architecture("Qwen3", pooling="lasttoken", head_dim=8, **LLAMA)(folder),
        edit(folder, "tokenizer_config.json", padding_side="left"),
    ),
    "dynamic rope within its trained length": architecture("Llama", **DYNAMIC),
    "longrope": lambda folder: (
        architecture(
            "Phi3", pooling="lasttoken", **LLAMA, original_max_position_embeddings=8,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [40.0] * 4},
        )(folder),
    ),
}  # fmt: skip

#: Models that are refused, with a part of the reason.
REFUSED: dict[str, tuple[Build, str]] = {
    "sparse encoder": (lambda folder: sparse_encoder(folder), "sparse vectors"),
    "multi-vector encoder": (lambda folder: multi_vector_encoder(folder), "one vector a token"),
    "cross-encoder": (lambda folder: cross_encoder(folder), "scores of pairs"),
    "bare language model": (
        lambda folder: architecture("Bert", head="ForMaskedLM", **SIZES, max_position_embeddings=40)(folder),
        "language model or SPLADE",
    ),
    "word embeddings": (modules(words(), POOLING), "WordEmbeddings, has the tokenizer WhitespaceTokenizer"),
    "bag of words": (modules(words("BoW")), "bag of words"),
    "chat template with a prompt": (chat_template(prompts=PROMPTS), "other tokens"),
    "window of two": (bert(window=2), "no room"),
    "prompt longer than the window": (bert(window=4, prompts={"document": "the petrel came: "}), "no room"),
    "no pooling": (lambda folder: without_pooling(folder), "encode_document fails"),
    "truncate_dim 0": (with_config(truncate_dim=0), "no vector of fixed length"),
    "nan": (lambda folder: broken(make_nan)(folder), "differ"),
    "a layer missing": (lambda folder: broken(drop("encoder.layer.1"))(folder), "lacks weights"),
    "no weights": (lambda folder: broken(drop("."))(folder), "lacks weights"),
    "configuration of a wrong type": (edited("config.json", vocab_size="many"), "cannot be loaded"),
    "unknown default prompt": (with_config(default_prompt_name="other"), "other"),
    "router without a route for documents": (
        modules(
            lambda: part("Router", {"query": [one() for one in BERT_ROUTE]}, allow_empty_key=False)(),
        ),
        "document",
    ),
    "dynamic rope": (
        lambda folder: (
            architecture("Llama", **DYNAMIC)(folder),
            edit(folder, "sentence_bert_config.json", max_seq_length=100),
        ),
        "dynamic RoPE",
    ),
}


def sparse_encoder(folder: Path) -> None:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer

    masked = folder.with_suffix(".masked")
    architecture("Bert", head="ForMaskedLM", **SIZES, max_position_embeddings=40)(masked)
    masked_model = Transformer(str(masked), transformer_task="fill-mask")
    SparseEncoder(modules=[masked_model, SpladePooling()], device="cpu").save(str(folder), **NO_CARD)


def multi_vector_encoder(folder: Path) -> None:
    from sentence_transformers.multi_vector_encoder import MultiVectorEncoder

    bare(folder.with_suffix(".bare"))
    MultiVectorEncoder(str(folder.with_suffix(".bare")), device="cpu").save_pretrained(str(folder), **NO_CARD)


def cross_encoder(folder: Path) -> None:
    from sentence_transformers import CrossEncoder

    bare(folder.with_suffix(".bare"))
    CrossEncoder(str(folder.with_suffix(".bare")), num_labels=1, device="cpu").save_pretrained(
        str(folder), **NO_CARD
    )


def bare(folder: Path) -> None:
    """Only a transformer, as older repositories have it: sentence-transformers adds mean pooling."""
    tiny_model(folder, "bert")
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink()


def without_pooling(folder: Path) -> None:
    tiny_model(folder, "bert")
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(listed[:1]))


def broken(change: Callable[[dict[str, Any]], Any]) -> Build:
    """A model whose weights are changed after they were saved."""

    def build(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tiny_model(folder, "bert")
        (path,) = folder.glob("*.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return build


def make_nan(tensors: dict[str, Any]) -> None:
    tensors["encoder.layer.1.output.dense.bias"][3] = float("nan")


def drop(part: str) -> Callable[[dict[str, Any]], None]:
    """Remove the weights whose names hold `part`."""

    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change
