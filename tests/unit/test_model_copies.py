"""Copies of the model are limited by memory: of the control group or the host, and of the GPU."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers import BUILTIN
from jobworker.handlers.copy_size import copy_size
from jobworker.handlers.encoder import copy_size as program
from jobworker.handlers.encoder.copy_size import least_free_card_bytes, size_of, weight_bytes
from jobworker.handlers.encoder.find_model import ModelError
from jobworker.handlers.settings import HandlerSettings
from jobworker.worker.admin import doctor
from jobworker.worker.admin.status_client import Service
from jobworker.worker.extension import CopySize
from jobworker.worker.host.cgroup import free_memory_bytes
from jobworker.worker.settings import Settings
from jobworker.worker.supervision import device_copies
from jobworker.worker.supervision.device_copies import copies_status, fit_copies, plan_copies

MIB = 1 << 20
V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1 = "32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
#: What the rest of the service is left.
ENGINE_MIB = 128


@pytest.fixture(autouse=True)
def eight_cores_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobworker.worker.devices.cores", lambda: 8)
    monkeypatch.setattr(device_copies, "cores", lambda: 8)
    monkeypatch.setattr(device_copies, "visible_gpus", lambda: 0)


def limited_root(folder: Path, version: int, limit_mib: int) -> Path:
    """A root whose control group has a limit of memory, of which 100 MiB are in use."""
    names = ("memory.max", "memory.current") if version == 2 else (
        "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")  # fmt: skip
    files = {
        "proc/self/cgroup": "0::/" if version == 2 else "5:memory:/",
        "proc/self/mountinfo": V2 if version == 2 else V1,
        "proc/meminfo": f"MemAvailable: {64 << 20} kB",
        f"sys/fs/cgroup/{names[0]}": str(limit_mib * MIB),
        f"sys/fs/cgroup/{names[1]}": str(100 * MIB),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("room_mib", "copies", "threads"),
    # One copy more than is loaded has room: the successor of a worker in a rolling restart.
    [(8 * 300, 4, 0), (5 * 300, 4, 0), (4 * 300, 3, 2), (3 * 300 - 1, 1, 8), (100, 1, 8)],
)
def test_a_limit_of_the_control_group_limits_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    version: int, room_mib: int, copies: int, threads: int,
) -> None:  # fmt: skip
    root = limited_root(tmp_path, version, 100 + ENGINE_MIB + room_mib)
    monkeypatch.setattr(device_copies, "free_memory_bytes", lambda: free_memory_bytes(root))
    with caplog.at_level(logging.WARNING):
        settings, plan = fit_copies(Settings(procs=4), CopySize(0, 300 * MIB))
    assert plan is not None
    assert (plan.copies, plan.wanted) == (copies, 4)
    assert (settings.device_copies, settings.device_threads) == (copies if copies < 4 else 0, threads)
    event = "device.copies_exceed_memory" if room_mib < 300 else "device.copies_limited"
    logged = [record for record in caplog.records if record.msg.startswith("device.")]
    assert {record.msg for record in logged} <= {event}
    assert [(vars(one)["copies"], vars(one)["free_mib"], vars(one)["copy_mib"]) for one in logged] == (
        [(copies, ENGINE_MIB + room_mib, 300)] if copies < 4 else []
    )


def planned(free_mib: int, size: CopySize, gpus: int = 0, **options: Any) -> tuple[int, int, bool]:
    plan = plan_copies(Settings(**options), size, free_mib * MIB, gpus)
    return plan.copies, plan.fit, plan.exceeds


def test_a_number_that_was_set_stays_and_is_reported_where_it_does_not_fit() -> None:
    size = CopySize(0, 300 * MIB)
    assert planned(128 + 900, size, procs=4, device_copies=3) == (3, 3, False)
    assert planned(128 + 899, size, procs=4, device_copies=3) == (3, 2, True)


def test_not_even_one_copy_fits_and_one_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_copies, "free_memory_bytes", lambda: 200 * MIB)
    fit_copies(Settings(procs=1), CopySize(0, 300 * MIB))
    assert [record.msg for record in caplog.records] == ["device.copies_exceed_memory"]


def test_shared_weights_count_once() -> None:
    assert planned(128 + 1000 + 400, CopySize(1000 * MIB, 100 * MIB), procs=8) == (3, 4, False)


def test_free_memory_of_the_gpu_limits_its_copies() -> None:
    big, host = 64 * 1024, CopySize(0, 300 * MIB, 3000 * MIB, 8000 * MIB)
    assert planned(big, host, 2, procs=8) == (2, 4, False)  # one for each of two GPUs, and a successor
    assert planned(big, host._replace(card_free_bytes=9000 * MIB), 2, procs=8) == (4, 6, False)
    assert planned(128 + 900, host._replace(card_free_bytes=9000 * MIB), 1, procs=8) == (2, 3, False)


def test_with_more_types_than_workers_can_refuse_every_worker_loads_the_model() -> None:
    handlers = {f"t{number}": "m:C" for number in range(65)}
    assert planned(128 + 600, CopySize(0, 300 * MIB), procs=4, handlers=handlers) == (4, 2, True)


def test_an_unknown_size_or_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(procs=4)
    assert fit_copies(settings, None) == (settings, None)
    monkeypatch.setattr(device_copies, "free_memory_bytes", lambda: 0)
    assert fit_copies(settings, CopySize(0, MIB)) == (settings, None)


def safetensors(path: Path, *tensors: tuple[str, list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"__metadata__": {"format": "pt"}} | {
        f"w{number}": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
        for number, (dtype, shape) in enumerate(tensors)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def test_weights_are_counted_in_full_precision(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors", ("F16", [1000, 10]), ("I64", [512]))
    safetensors(tmp_path / "2_Dense/model.safetensors", ("F32", [10, 10]))
    safetensors(tmp_path / "openvino/model.safetensors", ("F32", [5000]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"0" * 100)
    assert weight_bytes(tmp_path) == 4 * (1000 * 10 + 10 * 10)


def test_weights_of_an_older_format_are_counted_by_the_size_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"0" * 100)
    assert weight_bytes(tmp_path) == 100


def test_a_copy_takes_its_weights_and_what_its_engine_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    model, weights = str(tmp_path), 4 * 64 * MIB
    safetensors(tmp_path / "model.safetensors", ("F32", [64, MIB]))
    monkeypatch.setattr(program, "was_converted", lambda _: False)
    assert size_of(model, "cpu", 0, 0) == CopySize(0, weights + 448 * MIB)
    assert size_of(model, "auto", 1, 0) == CopySize(0, weights + 448 * MIB)
    assert size_of(model, "auto", 1, 5 * MIB) == CopySize(
        0, weights + 448 * MIB, weights + 1024 * MIB, 5 * MIB
    )
    monkeypatch.setattr(program, "was_converted", lambda _: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert size_of(model, "cpu", 0, 0) == CopySize(weights, 192 * MIB)
    with pytest.raises(ModelError):
        size_of(str(tmp_path / "absent"), "cpu", 0, 0)


@pytest.mark.parametrize(
    ("devices", "visible", "free_mib"),
    [(["cuda:0", "cuda:1"], "", 700), (["cuda:0"], "", 900), (["cuda:0"], "1", 700), (["cuda:0"], "MIG-5", 0),
     (["cuda:1"], "0", 0), (["cpu"], "", 0)],
)  # fmt: skip
def test_the_driver_reports_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str], visible: str, free_mib: int
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase $2 in 0,1) echo 900; echo 700;; 0) echo 900;; 1) echo 700;; '
                    '*) echo "[N/A]";; esac\n')  # fmt: skip
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert least_free_card_bytes(devices, {"CUDA_VISIBLE_DEVICES": visible}) == free_mib * MIB
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert least_free_card_bytes(devices, {}) == 0


def test_services_without_a_model_start_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a program was started"))
    assert copy_size(HandlerSettings(handlers={"audit": BUILTIN["audit"]})) is None
    assert copy_size(HandlerSettings(handlers=BUILTIN, model="dummy:8")) is None
    assert copy_size(HandlerSettings(handlers=BUILTIN, device="none")) is None


def test_the_size_of_a_model_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    safetensors(tmp_path / "model.safetensors", ("F32", [64, MIB]))
    found = copy_size(HandlerSettings(handlers=BUILTIN, model=str(tmp_path), device="cpu"))
    assert found == CopySize(0, 448 * MIB + 4 * 64 * MIB)
    assert copy_size(HandlerSettings(handlers=BUILTIN, model=str(tmp_path / "absent"))) is None


@pytest.mark.parametrize(
    ("free_mib", "options", "level", "says"),
    [(128 + 600, {}, "note", "allows 1 of 4 copies"), (128 + 600, {"device_copies": 3}, "wrong", "3 copies"),
     (9000, {}, "", "")],
)  # fmt: skip
def test_doctor_shows_it(free_mib: int, options: dict[str, Any], level: str, says: str) -> None:
    plan = plan_copies(Settings(procs=4, **options), CopySize(0, 300 * MIB), free_mib * MIB, 0)
    status = {"ready": True, "version": "1", "children": [], "device_copies": copies_status(plan)}
    findings = [one for one in doctor.service_findings([Service("http://a", status)], False, "1")
                if "copies" in one.says]  # fmt: skip
    assert [one.level for one in findings] == ([level] if level else [])
    assert all(says in one.says and str(free_mib) in one.says for one in findings)
