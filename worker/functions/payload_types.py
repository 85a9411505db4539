"""Payload types: from a parameter's annotation to a function that parses and validates a payload's bytes."""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import inspect

from ..envelope import exact_number
from ..errors import ConfigurationError, MalformedPayload

#: Errors of one payload that are named; a list of a million wrong items has as many.
_NAMED_ERRORS = 5

#: Parses and validates a payload. Raises `MalformedPayload`.
PayloadReader = Callable[[msgspec.Raw], Any]


def payload_reader(annotation: Any, *, exact_numbers: bool = False) -> PayloadReader:
    """A function that parses and validates the bytes of a payload in one pass, into the annotated type.

    ``annotation``: anything that msgspec decodes (Struct, dataclass, TypedDict, containers, numbers, Any), or
    a type with BaseModel classes or dataclasses of pydantic in it. With ``exact_numbers``, numbers with a
    fraction are `decimal.Decimal` where the annotation says Any. Raises `ConfigurationError` for any other
    annotation.
    """
    try:
        info = inspect.type_info(annotation)
        classes = list(_foreign_classes(info))
        if any(hasattr(one, "__pydantic_validator__") for one in classes):
            if exact_numbers:
                raise ConfigurationError(
                    "exact_numbers does not apply to pydantic: use fields of type Decimal"
                )
            return _pydantic_reader(annotation)
        if classes:
            raise ConfigurationError(
                f"{classes[0].__qualname__} is no type of JSON: use a msgspec.Struct, a dataclass, "
                "a BaseModel, a TypedDict, dict, list or a plain value"
            )
        return _msgspec_reader(annotation, exact_numbers)
    except ConfigurationError:
        raise
    except Exception as error:  # of both libraries, for types that they do not support
        raise ConfigurationError(f"{type(error).__name__}: {error}") from error


def _foreign_classes(info: inspect.Type) -> Iterator[type]:
    """Classes in a type that msgspec does not decode by itself, and classes of pydantic."""
    seen: set[int] = set()
    unseen: list[Any] = [info]
    while unseen:
        one = unseen.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, inspect.CustomType | inspect.DataclassType):
            # `object` takes every value, as Any does.
            custom = isinstance(one, inspect.CustomType) and one.cls is not object
            if custom or hasattr(one.cls, "__pydantic_validator__"):
                yield one.cls
        if isinstance(one, msgspec.Struct):
            unseen += [getattr(one, name) for name in one.__struct_fields__]
        elif isinstance(one, tuple):
            unseen += one


def _msgspec_reader(annotation: Any, exact_numbers: bool) -> PayloadReader:
    decode = msgspec.json.Decoder(annotation, float_hook=exact_number if exact_numbers else None).decode

    def read(payload: msgspec.Raw) -> Any:
        try:
            return decode(payload)
        except RecursionError:
            raise MalformedPayload("nested too deeply") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedPayload(_located(error)) from None

    return read


def _located(error: Exception) -> str:
    """The error's text with the path from the job on, as errors of a job's other fields have it."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return text
    said, _, where = text.rpartition(" - at ")
    if "`$" in where and said:
        return f"{said} - at {where.replace('`$', '`$.payload', 1)}"
    return f"{text} - at `$.payload`"


def _pydantic_reader(annotation: Any) -> PayloadReader:
    from pydantic import TypeAdapter, ValidationError

    validate = TypeAdapter(annotation).validate_json

    def read(payload: msgspec.Raw) -> Any:
        try:
            return validate(bytes(payload))
        except ValidationError as error:
            # Without the input, which may be large or private.
            found = error.errors(include_url=False, include_context=False, include_input=False)
        named = [f"{one['msg']} - at `$.payload{_path(one['loc'])}`" for one in found[:_NAMED_ERRORS]]
        more = [f"and {len(found) - _NAMED_ERRORS} more"] if len(found) > _NAMED_ERRORS else []
        raise MalformedPayload("; ".join(named + more))

    return read


def _path(keys: tuple[int | str, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
