"""Who may ask: bearer tokens and their tenants, and the names by which a loopback address may be called."""

import logging
import os
import time
from collections.abc import Callable

from starlette.requests import Request

from jobworker.worker import ConfigurationError
from jobworker.worker.http.bearer_tokens import BearerTokens, TokenHolder, read_tokens
from jobworker.worker.urls import is_loopback

from .errors import ApiError

log = logging.getLogger("jobworker.api")

#: How often the token file is looked at.
RELOAD_EVERY_S = 1.0


class ApiAccess:
    """Checks the token of each request. The file is read again when it changes.

    Without a file every client on this machine may ask for every tenant.
    """

    def __init__(self, token_file: str, mono_s: Callable[[], float] = time.monotonic) -> None:
        """Raises `ConfigurationError` if the file cannot be used."""
        self._file, self._mono_s = token_file, mono_s
        self._tokens: BearerTokens | None = None
        self._stat: tuple[int, int, int] | None = None
        self._mono_looked_s = mono_s()
        if token_file:
            self._stat = self._read_stat()
            self._tokens = read_tokens(token_file)

    def holder(self, request: Request) -> TokenHolder:
        """The owner of the request's token. Raises ApiError 401, or 421 for a foreign host name."""
        if not self._file:
            host = request.headers.get("host", "")
            if not is_loopback(host):  # a web site whose name was pointed at this machine (DNS rebinding)
                raise ApiError(421, f"without tokens this API answers to loopback names only, not {host!r}")
            return TokenHolder("")
        if self._mono_s() - self._mono_looked_s >= RELOAD_EVERY_S:
            self._reload()
        assert self._tokens is not None
        holder = self._tokens.holder(request.headers.get("authorization", ""))
        if holder is None:
            raise ApiError(401, "give a valid token: Authorization: Bearer TOKEN")
        return holder

    def _read_stat(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._file)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_ctime_ns  # a change of the mode counts

    def _reload(self) -> None:
        self._mono_looked_s = self._mono_s()
        found = self._read_stat()
        if found == self._stat:
            return
        self._stat = found
        try:
            self._tokens = read_tokens(self._file)
        except ConfigurationError as error:
            hint = "the previous tokens stay valid"
            log.error("api.tokens_rejected", extra={"error": str(error), "hint": hint})
        else:
            log.info("api.tokens_reloaded")


def require_scope(holder: TokenHolder, tenant_id: str, project_id: str) -> None:
    """Raises ApiError 403 if the token is for another tenant or project."""
    if holder.tenant and holder.tenant != tenant_id:
        raise ApiError(403, "this token is for another tenant", param="tenant_id")
    if holder.project and holder.project != project_id:
        raise ApiError(403, "this token is for another project", param="project_id")
