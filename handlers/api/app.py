"""ASGI application of the HTTP API: routes, limits, metrics and access log of every request."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from jobworker.worker.api_role import ApiLink, part
from jobworker.worker.api_role import request as request_span
from jobworker.worker.http.bearer_tokens import TokenHolder

from .access import ApiAccess, require_scope
from .errors import ApiError, openai_body, tei_body
from .models import Models
from .payloads import (
    EmbeddingsRequest,
    EmbedRequestBody,
    SearchRequest,
    check_dimensions,
    embeddings_body,
    parse,
    purpose_of_prompt,
    shortened,
    texts_of,
    unit_length,
)
from .search import Searcher

log = logging.getLogger("jobworker.api")

#: A client that gets no answer within this time gets 503: clients' own timeouts are mostly 30 s and more.
DEADLINE_S = 25.0
#: What a client of a busy or failing dependency waits before it tries again.
RETRY_AFTER_S = 2

#: Of an address, which a proxy on this machine may state.
MAX_CLIENT_CHARS = 64

_ErrorBody = Callable[[ApiError], dict[str, Any]]


@dataclass
class Call:
    """One request: what its log line and its metrics say."""

    request: Request
    tenant: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


_Handler = Callable[[Call, TokenHolder], Awaitable[Any]]


class Api:
    """Routes of the HTTP API."""

    def __init__(
        self,
        models: Models,
        searcher: Searcher,
        access: ApiAccess,
        link: ApiLink,
        *,
        max_body_bytes: int,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._models, self._searcher, self._access, self._link = models, searcher, access, link
        self._max_body_bytes, self._deadline_s = max_body_bytes, deadline_s

    def application(self) -> Starlette:
        """The ASGI application."""
        application = Starlette(
            routes=[
                self._route("/v1/embeddings", self._embeddings),
                self._route("/embeddings", self._embeddings),
                self._route("/embed", self._embed, tei_body),
                self._route("/v1/search", self._search),
                self._route("/v1/models", self._list_models, method="GET"),
                Route("/health", self._health),
            ],
            exception_handlers={HTTPException: _refused, Exception: _failed},
        )
        # Behind a proxy with TLS the redirect is to http://, where a client would show its token.
        application.router.redirect_slashes = False
        return application

    # -- one request

    def _route(
        self, path: str, handler: _Handler, error_body: _ErrorBody = openai_body, method: str = "POST"
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            mono_start_s = time.monotonic()
            call = Call(request)
            facts: dict[str, Any] = {"http.request.method": method, "http.route": path}
            with request_span(f"{method} {path}", request.headers, facts):
                response = await self._respond(call, handler, error_body)
                facts |= {"http.response.status_code": response.status_code, **call.facts}
                if call.tenant:
                    facts["tenant_id"] = call.tenant
            self._record(path, call, response.status_code, time.monotonic() - mono_start_s)
            return response

        return Route(path, endpoint, methods=[method])

    async def _respond(self, call: Call, handler: _Handler, error_body: _ErrorBody) -> Response:
        try:
            return _json(await self._answer(call, handler))
        except ApiError as error:
            call.facts["error"] = error.message
            return _json(error_body(error), error.status, error.headers())
        except ClientDisconnect:
            call.facts["error"] = "the client closed the connection"
            return Response(status_code=499)

    async def _answer(self, call: Call, handler: _Handler) -> Any:
        try:
            holder = self._access.holder(call.request)
            call.tenant = holder.tenant
            async with asyncio.timeout(self._deadline_s):
                return await handler(call, holder)
        except TimeoutError:
            text = f"no answer within {self._deadline_s:g} s"
            raise ApiError(503, text, code="timeout", retry_after_s=RETRY_AFTER_S) from None
        except (ApiError, ClientDisconnect):
            raise
        except Exception as error:
            log.exception("api.request_failed", extra={"path": call.request.scope["path"]})
            raise ApiError(500, "an error of the server; its log says more") from error

    def _record(self, path: str, call: Call, status: int, took_s: float) -> None:
        metrics = self._link.metrics
        metrics.count("z_novel_api_requests_total", (path, str(status)))
        metrics.histogram("z_novel_api_request_seconds", (path,)).add(took_s)
        client = call.request.client
        log.info(
            "api.request",
            extra={
                "method": call.request.method,
                "path": path,
                "status": status,
                "took_ms": round(took_s * 1000, 1),
                "client": client.host[:MAX_CLIENT_CHARS] if client else "",
                **({"tenant_id": call.tenant} if call.tenant else {}),
                **call.facts,
            },
        )

    async def _body(self, request: Request) -> bytes:
        """The body. Raises ApiError 413 if it is too large."""
        announced = request.headers.get("content-length", "")
        chunks, size = [], int(announced) if announced.isdecimal() and len(announced) < 16 else 0
        if size <= self._max_body_bytes:
            size = 0
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > self._max_body_bytes:
                    break
        if size > self._max_body_bytes:
            raise ApiError(413, f"the body is larger than {self._max_body_bytes} bytes")
        return b"".join(chunks)

    # -- routes

    async def _embeddings(self, call: Call, holder: TokenHolder) -> Any:
        asked = parse(await self._body(call.request), EmbeddingsRequest)
        model = self._models.own
        self._models.check_name(asked.model)
        texts = texts_of(asked.input, "input")
        check_dimensions(asked.dimensions, model.encoder.dim, self._models.shorter)
        with part("embed", texts=len(texts)):
            vectors, tokens, _ = await model.embed(texts, asked.input_type or "document")
        call.facts |= {"texts": len(texts), "tokens": tokens}
        vectors = shortened(vectors, asked.dimensions)
        return embeddings_body(vectors, asked.encoding_format, asked.model or self._models.names()[0], tokens)

    async def _embed(self, call: Call, holder: TokenHolder) -> Any:
        asked = parse(await self._body(call.request), EmbedRequestBody)
        model = self._models.own
        texts, purpose = texts_of(asked.inputs, "inputs"), purpose_of_prompt(asked.prompt_name)
        check_dimensions(asked.dimensions, model.encoder.dim, self._models.shorter)
        with part("embed", texts=len(texts)):
            vectors, tokens, _ = await model.embed(texts, purpose)
        call.facts |= {"texts": len(texts), "tokens": tokens}
        vectors = shortened(vectors, asked.dimensions, normalise=asked.normalize)
        return unit_length(vectors) if asked.normalize else vectors

    async def _search(self, call: Call, holder: TokenHolder) -> Any:
        asked = parse(await self._body(call.request), SearchRequest)
        call.tenant = asked.tenant_id[:64]
        require_scope(holder, asked.tenant_id, asked.project_id)
        found = await self._searcher.search(asked)
        call.facts |= {
            "hits": len(found["results"]),
            "collection": found["collection"],
            "mode": found["mode"],
        }
        return found

    async def _list_models(self, call: Call, holder: TokenHolder) -> Any:
        _ = self._models.own
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "jobworker"}
            for name in self._models.names()
        ]
        return {"object": "list", "data": data}

    async def _health(self, request: Request) -> Response:
        """200 once the model is loaded. Needs no token and tells nothing else."""
        if not self._models.ready:
            return _json({"status": "loading"}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        return _json({"status": "ok"})


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, "application/json")


def _refused(request: Request, error: Exception) -> Response:
    """A path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    text = f"{error.detail}: {request.method} {request.scope['path']}"
    return _json(openai_body(ApiError(error.status_code, text)), error.status_code, error.headers)


def _failed(request: Request, error: Exception) -> Response:
    return _json(openai_body(ApiError(500, "an error of the server; its log says more")), 500)
