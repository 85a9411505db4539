"""Loads the encoder of a model: picks the engine, torch or OpenVINO, and imports only that one."""

import importlib.util
import logging
from functools import cache
from typing import NamedTuple, cast

from jobworker.worker import NO_DEVICE, device_for_slot, visible_gpus

from .base import TOKEN_BUDGET, DummyEncoder, Encoder, Engine, LongText
from .find_model import ModelError, ModelSource, default_model, find_model

log = logging.getLogger("jobworker.model")


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

    Without a name the small model of the extra `embedded` if installed, else bge-m3. Nothing is fetched.
    `dtype` (auto, fp32, bf16, fp16) is checked against full precision: what differs too much is not used.
    The same arguments in the same process give the same encoder. Raises ModelError, before anything heavy
    is imported where the model is missing.
    """
    if long_text not in ("windows", "truncate", "reject"):
        raise ModelError(f"long text {long_text!r}: say windows, truncate or reject")
    if dtype not in ("auto", "fp32", "bf16", "fp16"):
        raise ModelError(f"dtype {dtype!r}: say auto, fp32, bf16 or fp16")
    options = _Options(dtype, threads, cast(LongText, long_text), token_budget)
    return _load(model or default_model(), device, options, engine)


class _Options(NamedTuple):
    """What every engine is told; the fields are the arguments of its `load`."""

    dtype: str
    threads: int
    long_text: LongText
    token_budget: int


@cache
def _load(model: str, device: str, options: _Options, engine: Engine) -> Encoder:
    kind, _, rest = model.partition(":")
    if kind == "dummy":
        if not rest.isdecimal() or not int(rest):
            raise ModelError(f"model {model!r}: say dummy:<dimension>, for example dummy:8")
        return DummyEncoder(int(rest), long_text=options.long_text)
    source = find_model(model)
    place = device_for_slot(device, 0, visible_gpus())
    if place == NO_DEVICE:
        raise ModelError(f"model {model}: this process is not to hold it")
    if place == "cpu" and engine != "torch" and (encoder := _by_openvino(source, options)):
        return encoder
    if engine == "openvino":
        raise ModelError(f"model {model} cannot be run by OpenVINO on {place}")
    # Imported late: users of the dummy encoder do not pay for torch.
    from .torch import TorchEncoder

    return TorchEncoder.load(source, device=place, **options._asdict())


def _by_openvino(source: ModelSource, options: _Options) -> Encoder | None:
    """The encoder that needs no torch, or None where torch has to do."""
    if importlib.util.find_spec("openvino") is None:
        return None
    from .converted_models import NoEngine
    from .openvino import OpenVinoEncoder

    try:
        return OpenVinoEncoder.load(source, **options._asdict())
    except NoEngine as error:
        log.warning(
            "model.engine_fallback", extra={"model": source.name, "engine": "torch", "error": str(error)}
        )
        return None
