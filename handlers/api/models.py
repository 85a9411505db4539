"""Models of the HTTP API: that of the service, and that of a collection rebuilt with another."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

from ..encoder.base import Encoder
from ..encoder.matryoshka import shorter_dimensions
from .batcher import Batcher
from .errors import ApiError

log = logging.getLogger("jobworker.api")

#: Models in memory at once: during a rebuild, the old and the new one.
MAX_MODELS = 2
#: A model that a collection needs is kept for this long before another takes its place. Otherwise two
#: collections of two further models would have each request load a model.
KEPT_S = 60.0
#: What a client waits before it tries again while a model is loaded.
LOADING_RETRY_S = 2
#: A model that cannot be loaded is tried again after this time, and not for each request.
FAILED_RETRY_S = 30.0


class Models:
    """Loads models in a thread, and keeps one `Batcher` for each. Use it in the event loop.

    ``load`` takes a name; the empty one means the service's own model.
    """

    def __init__(
        self,
        load: Callable[[str], Encoder],
        names: Sequence[str],
        on_batch: Callable[[int, int], None],
        mono_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``names``: what clients may call the service's own model, beside its own name."""
        self._load, self._on_batch, self._mono_s = load, on_batch, mono_s
        self._names = list(names)
        self._batchers: dict[str, Batcher] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._mono_failed_s: dict[str, float] = {}
        # Since when models are needed: the first question after a model was loaded, or the last one before.
        self._mono_needed_s: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, "load")
        self._own = ""
        #: Dimensions to which vectors of the own model may be shortened.
        self.shorter: Sequence[int] = ()

    async def load_own(self) -> None:
        """Load the service's own model. Raises what ``load`` raises."""
        loop = asyncio.get_running_loop()
        encoder = await loop.run_in_executor(self._thread, self._load, "")
        self.shorter = await loop.run_in_executor(self._thread, shorter_dimensions, encoder.name, encoder.dim)
        self._own = encoder.name
        self._batchers[encoder.name] = Batcher(encoder, on_batch=self._on_batch)

    @property
    def ready(self) -> bool:
        """Whether the own model is loaded."""
        return bool(self._own)

    @property
    def own(self) -> Batcher:
        """The service's own model. Raises ApiError 503 while it is loaded."""
        if not self._own:
            raise _loading("the model")
        return self._batchers[self._own]

    def names(self) -> list[str]:
        """Names of the own model; the first is the one that answers show."""
        own = self._own and [self._own, PurePath(self._own).name, self._own.partition(":")[2]]
        return list(dict.fromkeys(filter(None, [*self._names, *(own or [])])))

    def check_name(self, name: str) -> None:
        """Raises ApiError 404 for a name of another model; without a name the own one is meant."""
        if name and name not in self.names():
            raise ApiError(
                404, f"the model {name[:200]!r} is not served here, but {', '.join(self.names())}; another "
                "name for it can be given by --serve-model-name", code="model_not_found", param="model",
            )  # fmt: skip

    def of_collection(self, model: str) -> Batcher:
        """The model of a collection; empty: the own one.

        Raises ApiError 503 while it is loaded, if it cannot be loaded, and while others take all the places.
        """
        if not model or model == self._own:
            return self.own
        if model not in self._batchers:
            self._check_room(model)
            self._mono_needed_s[model] = self._mono_s()
            self._begin(model)
            if model not in self._loading:
                text = f"the model {model} of this collection cannot be loaded; the service's log says why"
                raise ApiError(503, text, code="model_failed", retry_after_s=int(FAILED_RETRY_S))
            raise _loading(f"the model {model} of this collection")
        self._mono_needed_s.setdefault(model, self._mono_s())
        return self._batchers[model]

    def _check_room(self, model: str) -> None:
        """Raises ApiError 503 while no model may be dropped for this one."""
        others = (self._batchers.keys() | self._loading.keys()) - {self._own}
        if model in others or len(others) < MAX_MODELS - 1:
            return
        wait_s = min(self._mono_needed_s.get(other, -KEPT_S) for other in others) + KEPT_S - self._mono_s()
        if wait_s > 0:
            fields = {"model": model, "kept": sorted(others), "wait_s": round(wait_s, 1)}
            log.warning("api.models_full", extra=fields)
            raise ApiError(
                503,
                f"the model {model} of this collection is not loaded: {MAX_MODELS} models are kept, and "
                f"{', '.join(sorted(others))} is in use; start another service with --model {model}",
                code="models_full",
                retry_after_s=math.ceil(wait_s),
            )

    def preload(self, model: str) -> None:
        """Begin to load a model that will be needed soon, unless it would replace one that is needed now."""
        if model and self._own and len(self._batchers.keys() | self._loading.keys()) < MAX_MODELS:
            self._begin(model)

    def _begin(self, model: str) -> None:
        failed_s = self._mono_failed_s.get(model, -FAILED_RETRY_S)
        may_try = self._mono_s() >= failed_s + FAILED_RETRY_S
        if may_try and model not in self._batchers and model not in self._loading:
            self._loading[model] = asyncio.get_running_loop().create_task(self._load_other(model))

    async def _load_other(self, model: str) -> None:
        try:
            encoder = await asyncio.get_running_loop().run_in_executor(self._thread, self._load, model)
        except Exception as error:
            log.error("api.model_failed", extra={"model": model, "error": str(error)})
            self._mono_failed_s[model] = self._mono_s()
            return
        finally:
            del self._loading[model]
        self._mono_failed_s.pop(model, None)
        others = sorted(
            self._batchers.keys() - {self._own}, key=lambda one: self._mono_needed_s.get(one, 0.0)
        )
        for name in others[: len(others) + 2 - MAX_MODELS]:
            self._batchers.pop(name).close()
            self._mono_needed_s.pop(name, None)
        self._batchers[model] = Batcher(encoder, on_batch=self._on_batch)

    def waiting_tokens(self) -> int:
        """Tokens that wait for a pass or are in one."""
        return sum(batcher.waiting_tokens for batcher in self._batchers.values())

    def longest_pass_s(self) -> float:
        """Seconds for which the longest current pass has been running."""
        return max((batcher.pass_s() for batcher in self._batchers.values()), default=0.0)

    def take_counters(self) -> dict[str, float]:
        """Running totals of the encoders, added up."""
        totals: dict[str, float] = {}
        for batcher in self._batchers.values():
            for name, value in batcher.encoder.counters.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def close(self) -> None:
        """End all threads after what they do now."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        for batcher in self._batchers.values():
            batcher.close()


def _loading(what: str) -> ApiError:
    return ApiError(503, f"{what} is being loaded", code="model_loading", retry_after_s=LOADING_RETRY_S)
