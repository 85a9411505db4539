"""Factory of encoders: picks the engine, torch or OpenVINO, and imports only that one."""

import importlib.util
import logging
from functools import cache
from typing import NamedTuple, cast

from jobworker.worker import NO_DEVICE, device_for_slot, visible_gpus

from ..settings import HandlerSettings
from .base import TOKEN_BUDGET, DummyEncoder, Encoder, Engine, LongText
from .find_model import ModelError, ModelSource, check_unchanged, default_model, find_model

log = logging.getLogger("jobworker.model")


def load_from_settings(settings: HandlerSettings, model: str = "") -> Encoder:
    """The encoder of `model`, by default the one that the settings name. As `load_encoder` in the rest."""
    return load_encoder(
        model or settings.model,
        settings.device,
        threads=settings.threads,
        long_text=settings.long_text,
        token_budget=settings.token_budget,
        dtype=settings.dtype,
    )


def load_encoder(
    model: str = "",
    device: str = "auto",
    *,
    threads: int = 1,
    long_text: str = "windows",
    token_budget: int = TOKEN_BUDGET,
    dtype: str = "auto",
    engine: Engine = "auto",
) -> Encoder:
    """Load a model: a folder, a hub name that is in the cache, `package:<module>` or `dummy:<dim>`.

    The default is the small model of the extra `embedded` if it is installed, else bge-m3. Nothing is
    downloaded. A `dtype` (auto, fp32, bf16, fp16) whose vectors differ too much from full precision is not
    used. The same arguments and files give the same encoder within a process. Raises ModelError; if the
    model is missing, before anything heavy is imported.
    """
    if long_text not in ("windows", "truncate", "reject"):
        raise ModelError(f"long text {long_text!r}: use windows, truncate or reject")
    if dtype not in ("auto", "fp32", "bf16", "fp16"):
        raise ModelError(f"dtype {dtype!r}: use auto, fp32, bf16 or fp16")
    options = _EngineOptions(dtype, threads, cast(LongText, long_text), token_budget)
    model = model or default_model()
    scheme, _, dim = model.partition(":")
    if scheme != "dummy":
        return _load(find_model(model), device, options, engine)
    if not dim.isdecimal() or not int(dim):
        raise ModelError(f"model {model!r}: use dummy:<dimension>, for example dummy:8")
    return _dummy(int(dim), options.long_text)


@cache
def _dummy(dim: int, long_text: LongText) -> DummyEncoder:
    return DummyEncoder(dim, long_text=long_text)


class _EngineOptions(NamedTuple):
    """The keyword arguments of every engine's `load`."""

    dtype: str
    threads: int
    long_text: LongText
    token_budget: int


# By the source, whose revision changes with the files.
@cache
def _load(source: ModelSource, device: str, options: _EngineOptions, engine: Engine) -> Encoder:
    model = source.name
    own_device = device_for_slot(device, 0, visible_gpus())
    if own_device == NO_DEVICE:
        raise ModelError(f"model {model}: this worker process is not one of those that load it")
    if own_device == "cpu" and engine != "torch" and (encoder := _load_openvino(source, options, engine)):
        return encoder
    if engine == "openvino":
        raise ModelError(f"model {model} cannot be run by OpenVINO on {own_device}")
    # Imported here: users of the dummy or of the protocol do not load torch.
    from .torch import TorchEncoder

    loaded = TorchEncoder.load(source, device=own_device, **options._asdict())
    check_unchanged(source)
    return loaded


def _load_openvino(source: ModelSource, options: _EngineOptions, engine: Engine) -> Encoder | None:
    """The OpenVINO encoder; None if torch has to run the model. Raises ModelError if `engine` is openvino."""
    if importlib.util.find_spec("openvino") is None:
        return None
    from .converted_models import EngineUnavailable
    from .openvino import OpenVinoEncoder

    try:
        return OpenVinoEncoder.load(source, **options._asdict())
    except EngineUnavailable as error:
        if engine == "openvino":
            raise ModelError(f"model {source.name} cannot be run by OpenVINO: {error}") from error
        log.warning(
            "model.engine_fallback", extra={"model": source.name, "engine": "torch", "error": str(error)}
        )
        return None
