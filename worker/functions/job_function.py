"""Functions as handlers: the decorator `job`, and the handler object that a decorated function becomes."""

import inspect
import re
import types
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import Field
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, overload
from uuid import UUID

import msgspec
from msgspec.structs import force_setattr

from ..envelope import MAX_NAME_CHARS, Job
from ..errors import ConfigurationError
from ..settings import Settings
from .payload_types import PayloadReader, payload_reader

#: Attribute of a decorated function.
_MARK = "__jobworker_job__"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class _Pydantic(Protocol):
    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray) -> Any: ...


#: Types that a payload is validated by, as far as a type checker can tell.
_Payload = TypeVar(
    "_Payload",
    bound=msgspec.Struct | _Dataclass | _Pydantic | Mapping[str, Any] | Iterable[Any]
    | float | date | time | timedelta | Decimal | UUID | Enum | None,
)  # fmt: skip
_Result = TypeVar("_Result")


class JobDecorator(Protocol):
    """What `job` returns: it takes a function of (payload), (payload, job) or (job), and returns it."""

    @overload
    def __call__(self, function: Callable[[_Payload], _Result]) -> Callable[[_Payload], _Result]: ...
    @overload
    def __call__(
        self, function: Callable[[_Payload, Job], _Result]
    ) -> Callable[[_Payload, Job], _Result]: ...
    @overload
    def __call__(
        self, function: Callable[[list[_Payload], list[Job]], _Result]
    ) -> Callable[[list[_Payload], list[Job]], _Result]: ...


class _Mark(NamedTuple):
    type: str
    options: dict[str, Any]


def job(
    type: str,
    *,
    timeout: float | None = None,
    max_timeout: float | None = None,
    max_batch: int | None = None,
    max_batch_bytes: float | None = None,
    batch_timeout: float | None = None,
    alone: bool | None = None,
    needs_device: bool | None = None,
    exact_numbers: bool | None = None,
    counters: Mapping[str, float] | None = None,
    setup: Callable[[Settings], Awaitable[None] | None] | None = None,
    healthy: Callable[[], Awaitable[None] | None] | None = None,
) -> JobDecorator:
    """Make a function the handler of a type; it stays a plain function for every other caller.

    The first parameter's annotation is the type of the payload, which is validated before the function runs.
    With ``max_batch`` above 1 and a parameter ``list[...]`` the function takes several jobs and returns one
    outcome a job. The options are the members of a handler class. Raises `ConfigurationError`.
    """
    if callable(type):
        raise ConfigurationError('write @job("type"), with the type of the jobs')
    check_job_type(type, f"@job({type!r:.80})")
    given = {
        "timeout": timeout, "max_timeout": max_timeout, "max_batch": max_batch,
        "max_batch_bytes": max_batch_bytes, "batch_timeout": batch_timeout, "alone": alone,
        "needs_device": needs_device, "exact_numbers": exact_numbers, "counters": counters, "setup": setup,
        "healthy": healthy,
    }  # fmt: skip
    mark = _Mark(type, {name: value for name, value in given.items() if value is not None})

    def decorate(function: Any) -> Any:
        if not isinstance(function, types.FunctionType):
            hint = "; a class says its type by job_type" if isinstance(function, _CLASS) else ""
            raise ConfigurationError(f"@job({type!r}) goes before a function, not {function!r:.80}{hint}")
        if _MARK in vars(function):
            raise ConfigurationError(
                f"@job({type!r}): {function.__name__} has a type: {job_type_of(function)}"
            )
        setattr(function, _MARK, mark)
        return function

    return decorate


#: The parameter of `job` covers the builtin of that name.
_CLASS = type


def check_job_type(name: object, label: str) -> None:
    """Raise `ConfigurationError`, which starts with ``label``, for what cannot be the type of a job."""
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= MAX_NAME_CHARS
        or _CONTROL.search(name)
        or name != name.strip()
    ):
        raise ConfigurationError(f"{label}: give a type of 1 to {MAX_NAME_CHARS} printable characters")


def job_type_of(function: object) -> str | None:
    """The type of a decorated function; None for anything else."""
    mark = getattr(function, _MARK, None) if isinstance(function, types.FunctionType) else None
    return mark.type if isinstance(mark, _Mark) else None


class _Signature(NamedTuple):
    """``payload``: the annotation of one payload, or None if the function takes the job only."""

    payload: Any
    takes_payload: bool
    takes_job: bool
    is_batch: bool


class FunctionHandler:
    """Handler made of a decorated function; its members are the options of the decorator.

    ``name`` is that of the function. With ``validates``, the payload of a job is its bytes until `validate`
    or ``handle`` replaces it. Raises `ConfigurationError` for a signature that no job can be passed to.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        mark: _Mark = getattr(function, _MARK)
        self.type = mark.type
        self.name = function.__name__
        signature = _signature(function, mark)
        self._read = self._reader(mark, signature)
        self.validates = self._read is not None
        for name, value in mark.options.items():
            setattr(self, name, value)
        member = "handle_batch" if signature.is_batch else "handle"
        setattr(
            self,
            member,
            self._batch(function, signature) if signature.is_batch else self._one(function, signature),
        )

    def _reader(self, mark: _Mark, signature: _Signature) -> PayloadReader | None:
        if not signature.takes_payload:
            return None
        exact = mark.options.get("exact_numbers") is True
        try:
            return payload_reader(signature.payload, exact_numbers=exact)
        except ConfigurationError as error:
            raise ConfigurationError(f"@job({mark.type!r}) {self.name}: payload: {error}") from None

    def validate(self, job: Job) -> Any:
        """Parse and validate the payload of a job, and put it into the job. Raises `MalformedPayload`."""
        assert self._read is not None
        payload = self._read(job.payload)
        force_setattr(job, "payload", payload)  # the job is new: nothing has read it
        return payload

    def _one(self, function: Callable[..., Any], signature: _Signature) -> Callable[[Job], Any]:
        validate = self.validate
        if not self.validates:
            return function
        if inspect.iscoroutinefunction(function):

            async def handle(job: Job) -> Any:
                payload = validate(job)
                return await (function(payload, job) if signature.takes_job else function(payload))

            return handle
        if signature.takes_job:
            return lambda job: function(validate(job), job)
        return lambda job: function(validate(job))

    def _batch(self, function: Callable[..., Any], signature: _Signature) -> Callable[[Sequence[Job]], Any]:
        """``handle_batch``: it takes jobs that `validate` has accepted."""

        def arguments(jobs: Sequence[Job]) -> list[Any]:
            payloads = [[job.payload for job in jobs]] if signature.takes_payload else []
            return [*payloads, *([list(jobs)] if signature.takes_job else [])]

        if inspect.iscoroutinefunction(function):

            async def handle_batch(jobs: Sequence[Job]) -> Any:
                return await function(*arguments(jobs))

            return handle_batch
        return lambda jobs: function(*arguments(jobs))


def _signature(function: Callable[..., Any], mark: _Mark) -> _Signature:
    """The parameters of a decorated function. Raises `ConfigurationError`."""
    where = f"@job({mark.type!r}) {function.__name__}"
    for form in (inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        if form(function):
            raise ConfigurationError(
                f"{where}: it contains `yield`, so a call of it runs nothing: remove `yield`"
            )
    annotations = _annotations(function, where)
    if not annotations or len(annotations) > 2:
        raise ConfigurationError(f"{where}: {_EXPECTED}, not {len(annotations)} parameters without a default")
    max_batch = mark.options.get("max_batch", 1)
    is_batch = isinstance(max_batch, int) and max_batch > 1 and _is_list(annotations[0])
    if annotations[0] in (list, Sequence) and isinstance(max_batch, int) and max_batch > 1:
        raise ConfigurationError(f"{where}: with max_batch, say what is in the list, for example list[dict]")
    first, *second = [_item(one) if is_batch else one for one in annotations]
    if is_batch and second and not _is_list(annotations[1]):
        raise ConfigurationError(
            f"{where}: a batch is passed as list[...]: the second parameter is list[Job]"
        )
    if _is_job(first) and second:
        raise ConfigurationError(f"{where}: {_EXPECTED}: the payload comes first")
    if second and not _is_job(second[0]):
        raise ConfigurationError(f"{where}: {_EXPECTED}: the second parameter is annotated as Job")
    takes_payload = not _is_job(first)
    return _Signature(
        first if takes_payload else None, takes_payload, bool(second) or not takes_payload, is_batch
    )


_EXPECTED = "its parameters are (payload), (payload, job) or (job)"


def _annotations(function: Callable[..., Any], where: str) -> list[Any]:
    """Annotations of the parameters that a job is passed to: those without a default, and an optional Job."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # a name that is missing, or a wrong expression in a text
        raise ConfigurationError(f"{where}: its annotations: {type(error).__name__}: {error}") from error
    found: list[Any] = []
    for parameter in inspect.signature(function).parameters.values():
        required = parameter.default is parameter.empty
        if parameter.kind not in _POSITIONAL:
            if required and parameter.kind is parameter.KEYWORD_ONLY:
                raise ConfigurationError(f"{where}: {_EXPECTED}: {parameter.name} needs a default")
            continue
        hint = hints.get(parameter.name, parameter.empty)
        if required and hint is parameter.empty:
            raise ConfigurationError(
                f"{where}: parameter {parameter.name} has no annotation: say which payload it takes, or Job"
            )
        if required or (len(found) == 1 and (_is_job(hint) or (_is_list(hint) and _is_job(_item(hint))))):
            found.append(hint)
    return found


def _is_job(annotation: Any) -> bool:
    """Whether it is Job, or Job and None."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return {Job, types.NoneType} == set(typing.get_args(annotation))
    return annotation is Job


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (list, Sequence) and len(typing.get_args(annotation)) == 1


def _item(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if _is_list(annotation) else annotation
