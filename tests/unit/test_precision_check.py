"""Precision check: which dtypes are tried, and which vectors pass."""

import numpy as np
import pytest

from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.encoder.precision_check import dtypes_to_try, is_exact


def test_fp32_is_always_the_last_choice() -> None:
    assert dtypes_to_try("auto", ()) == ("fp32",)
    assert dtypes_to_try("auto", ("fp16", "bf16")) == ("fp16", "bf16", "fp32")
    assert dtypes_to_try("bf16", ("fp16",)) == ("bf16", "fp32")
    assert dtypes_to_try("fp32", ("fp16",)) == ("fp32",)
    with pytest.raises(ValueError, match="use auto, fp32, bf16 or fp16"):
        dtypes_to_try("int8", ())


def test_nan_and_zero_fail_the_precision_check() -> None:
    good = DummyEncoder(8).probe()
    assert is_exact(good, good)
    assert not is_exact(np.full_like(good, np.nan), good)
    assert not is_exact(np.zeros_like(good), good)
