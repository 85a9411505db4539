"""Refusals of the store that concern the keys of one stream, in words that name the key and its repair."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import StoreRefused, StoreUnavailable
from ..keys import Source
from ..store.ports import KeyFault

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore


def faults_of(store: "OperatorStore", stream: str, key_of: Callable[[str], str]) -> list[KeyFault]:
    """What is wrong with one of the keys of a stream, which ``key_of`` names. Raises `StoreUnavailable`."""
    key = key_of(stream)
    return [fault for fault in store.key_faults(Source(stream, "")) if fault.key == key]


def refusal(what: str, error: StoreRefused, read_faults: Callable[[], Sequence[KeyFault]]) -> str:
    """That the store refuses a part of a deployment. ``read_faults`` asks it for the faults of the keys."""
    faults: Sequence[KeyFault] = ()
    with suppress(StoreUnavailable):
        faults = read_faults()
    if not faults:
        return f"{what}: {error}; jobworker doctor names the key and its repair"
    repairs = "; ".join(f"key {fault.key} {fault.problem}: repair it by {fault.repair}" for fault in faults)
    return f"{what}: {repairs}"
