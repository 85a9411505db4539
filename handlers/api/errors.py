"""Errors of the HTTP API, in the forms of OpenAI and of text-embeddings-inference."""

from typing import Any

#: Longest message. It may quote a value of the request, which may have megabytes, and is logged too.
MAX_MESSAGE_CHARS = 600
#: Of a longer one, what its end keeps: the name of a field.
_END_CHARS = 60


class ApiError(Exception):
    """An answer other than 200. ``param`` is the field at fault; ``retry_after_s`` becomes Retry-After."""

    def __init__(
        self, status: int, message: str, *, code: str = "", param: str | None = None, retry_after_s: int = 0
    ) -> None:
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[: MAX_MESSAGE_CHARS - _END_CHARS - 1]}…{message[-_END_CHARS:]}"
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param = code or _CODES.get(status, "invalid_request"), param
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    421: "misdirected_request",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "unavailable",
}


def openai_body(error: ApiError) -> dict[str, Any]:
    """The body that OpenAI's clients expect."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def tei_body(error: ApiError) -> dict[str, Any]:
    """The body that clients of text-embeddings-inference expect."""
    kinds = {429: "Overloaded", 500: "Backend", 503: "Unhealthy"}
    return {"error": error.message, "error_type": kinds.get(error.status, "Validation")}
