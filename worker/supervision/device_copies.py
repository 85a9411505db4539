"""Number of workers with a device, as far as the memory allows.

Each of them loads a copy of its own of what the device computes. The supervisor chooses the number once,
after the stores are up and before the first worker starts: later, the free memory depends on the workers that
have loaded already.
"""

import logging
from dataclasses import replace
from typing import Any, NamedTuple

from ..devices import NO_DEVICE, device_for_slot, device_names, visible_gpus
from ..extension import CopySize, extension
from ..host.cgroup import free_memory_bytes
from ..ipc.channel import MASKED_TYPES
from ..settings import Settings, cores

log = logging.getLogger("jobworker.supervisor")

_MIB = 1024 * 1024
#: What reader, reaper and workers without a copy need; the free memory is read before they start.
_ENGINE_BYTES = 128 * _MIB


class CopyPlan(NamedTuple):
    """``copies`` are loaded, of ``wanted`` that would help or were set; ``fit`` have room at the same time.

    Memory in MiB: free at the start, for each copy, and once for all.
    """

    copies: int
    wanted: int
    fit: int
    free_mib: int
    copy_mib: int
    shared_mib: int

    @property
    def limited(self) -> bool:
        """Whether fewer are loaded for lack of memory."""
        return self.copies < self.wanted

    @property
    def exceeds(self) -> bool:
        """Whether those that are loaded need more than there is."""
        return self.copies > self.fit


def plan_copies(settings: Settings, size: CopySize, free_bytes: int, gpus: int) -> CopyPlan:
    """How many copies the workers of a service load in ``free_bytes`` of memory.

    A number that the operator has set stays. Otherwise each device has room for one copy more than it holds:
    a rolling restart starts the successor of a worker before the worker ends.
    """
    devices = device_names(settings.device, gpus)
    places = [device_for_slot(settings.device, slot, gpus, settings.device_copies)
              for slot in range(settings.procs)]  # fmt: skip
    all_load = len(settings.handlers) > MASKED_TYPES
    wanted = settings.procs if all_load else sum(place != NO_DEVICE for place in places)
    fit = max(0, free_bytes - _ENGINE_BYTES - size.shared_bytes) // size.each_bytes
    if size.card_each_bytes:
        fit = min(fit, len(devices) * (size.card_free_bytes // size.card_each_bytes))
    is_fixed = settings.device_copies or all_load
    most = wanted if is_fixed else max(1, fit // len(devices) - 1) * len(devices)
    return CopyPlan(
        min(wanted, most), wanted, fit,
        free_bytes // _MIB, size.each_bytes // _MIB, size.shared_bytes // _MIB,
    )  # fmt: skip


def fit_copies(settings: Settings, size: CopySize | None) -> tuple[Settings, CopyPlan | None]:
    """The settings with as many copies as fit, and the plan; None if a size or the memory is unknown."""
    free_bytes, gpus = free_memory_bytes(), visible_gpus()
    if size is None or not free_bytes:
        return settings, None
    plan = plan_copies(settings, size, free_bytes, gpus)
    if plan.exceeds:
        log.warning("device.copies_exceed_memory", extra={**plan._asdict(), "hint": (
            f"lower {extension().copies_option} or --procs, or give the service more memory"
        )})  # fmt: skip
    elif plan.limited:
        log.warning("device.copies_limited", extra={**plan._asdict(), "hint": (
            f"give the service more memory, or set {extension().copies_option}"
        )})  # fmt: skip
    if not plan.limited:
        return settings, plan
    devices = device_names(settings.device, gpus)
    # The workers without a copy leave their processors to those with one.
    threads = max(settings.threads, cores() // plan.copies) if devices == ["cpu"] else 0
    return replace(settings, device_copies=-(-plan.copies // len(devices)), device_threads=threads), plan


def copies_status(plan: CopyPlan | None) -> dict[str, Any] | None:
    """The plan for /status."""
    return plan and {**plan._asdict(), "limited": plan.limited, "exceeds": plan.exceeds}
