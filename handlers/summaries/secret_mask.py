"""Mask of secrets in texts that another program sends: an endpoint may repeat the key that it was given."""

import base64

# The escaped forms of a secret: orjson escapes no letters.
import json
from collections.abc import Iterable, Iterator
from urllib.parse import parse_qsl, quote, unquote, urlsplit

#: Length of the parts of a secret that are masked: programs show the beginning or the end of a wrong key.
_PART_CHARS = 8
#: Of longer texts, only the beginning is kept.
_MAX_CHARS = 4096
_MASK = "***"
_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


class SecretMask:
    """Replaces secrets by `***`, also in part, in other case, and as JSON, URLs and base64 write them."""

    def __init__(self, secrets: Iterable[str]) -> None:
        #: Parts of the secrets by their length.
        self._parts: dict[int, set[str]] = {}
        for secret in filter(None, secrets):
            for text in _spellings(secret):
                size = min(_PART_CHARS, len(text))
                parts = {text[at : at + size] for at in range(len(text) - size + 1)}
                self._parts.setdefault(size, set()).update(parts)

    def mask(self, text: str) -> str:
        """At most 4,096 characters of the text, without the secrets."""
        lower = text[: _MAX_CHARS + _PART_CHARS].translate(_LOWER)
        secret = bytearray(len(lower))
        for size, parts in self._parts.items():
            for at in range(len(lower) - size + 1):
                if lower[at : at + size] in parts:
                    secret[at : at + size] = b"\1" * size
        return "".join(
            (_MASK if not at or not secret[at - 1] else "") if secret[at] else text[at]
            for at in range(min(len(lower), _MAX_CHARS))
        )


def _spellings(secret: str) -> set[str]:
    encoded = base64.b64encode(secret.encode(errors="replace")).decode().rstrip("=")
    as_json = [json.dumps(secret, ensure_ascii=ascii)[1:-1] for ascii in (True, False)]
    slashed = [text.replace("/", "\\/") for text in as_json]
    texts = (secret, *as_json, *slashed, quote(secret, safe=""), encoded)
    return {text.translate(_LOWER) for text in texts}


def url_secrets(url: str) -> Iterator[str]:
    """The password, the values of the query, and what is sent for user and password."""
    try:
        parts = urlsplit(url)
        values = [value for _, value in parse_qsl(parts.query)]
    except ValueError:
        return
    yield from values
    if parts.password:
        yield unquote(parts.password)
        yield base64.b64encode(f"{unquote(parts.username or '')}:{unquote(parts.password)}".encode()).decode()
