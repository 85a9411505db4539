"""Shorter dimensions for which a model was trained (Matryoshka), as its configuration files name them."""

from pathlib import Path
from typing import Any

import orjson

from .find_model import ModelError, find_model

#: Files of a model that may name them, and the keys in use.
_FILES = ("config.json", "config_sentence_transformers.json")
_KEYS = ("matryoshka_dimensions", "matryoshka_dims")


def shorter_dimensions(model: str, dim: int) -> tuple[int, ...]:
    """The dimensions below ``dim`` to which vectors of a model may be shortened; empty for most models."""
    try:
        folder = find_model(model).folder
    except ModelError:
        return ()  # a model without a folder
    found = {number for name in _FILES for number in _named(folder / name)}
    return tuple(sorted(number for number in found if 0 < number < dim))


def _named(path: Path) -> list[int]:
    try:
        content: Any = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return []
    values = [content.get(key) for key in _KEYS] if isinstance(content, dict) else []
    return [one for value in values if isinstance(value, list) for one in value if type(one) is int]
