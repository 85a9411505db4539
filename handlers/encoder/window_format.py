"""Format of the texts of one purpose: what a model puts around their tokens, and how many it takes."""

import msgspec


class WindowFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Format of the windows of one purpose; a part of the metadata of a converted model."""

    #: Tokens of one window, special tokens included.
    max_tokens: int
    #: Special tokens before and after every text.
    prefix: list[int] = []
    suffix: list[int] = []
    #: Put before every text.
    prompt: str = ""
    #: Whether a text that is truncated loses its beginning instead of its end.
    truncates_left: bool = False
    #: Whether the model scales vectors to length 1.
    normalises: bool = True
    #: Whether a window without tokens has a vector.
    embeds_nothing: bool = False

    @property
    def body_limit(self) -> int:
        """Tokens of a window without its special tokens."""
        return self.max_tokens - len(self.prefix) - len(self.suffix)

    def window(self, body: list[int]) -> list[int]:
        """The window of these tokens, which are at most `body_limit`."""
        return self.prefix + body + self.suffix

    def truncate(self, body: list[int]) -> list[int]:
        """The tokens that are left of `body` in the only window of its text."""
        limit = self.body_limit
        return body[max(0, len(body) - limit) :] if self.truncates_left else body[:limit]
