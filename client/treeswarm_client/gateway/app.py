"""The gateway's HTTP routes."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from functools import cache, partial
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from treeswarm import __version__
from treeswarm.errors import SwarmError
from treeswarm_client.gateway.access import key_check
from treeswarm_client.gateway.answers.serving import EVENT_HEADERS
from treeswarm_client.gateway.answers.writer import data_frame
from treeswarm_client.gateway.anthropic.errors import error_body
from treeswarm_client.gateway.anthropic.routes import anthropic_routes
from treeswarm_client.gateway.backend import Backend
from treeswarm_client.gateway.browser.page import (
    describe_gateway,
    docs_page,
    front_page,
    make_files_app,
    make_schema,
    map_page,
)
from treeswarm_client.gateway.browser.watchers import MapEvent
from treeswarm_client.gateway.errors import INTERNAL, Failure, failure_of
from treeswarm_client.gateway.middleware import BodyLimit, LocalHostOnly, RequestCounter, RequestLog, id_headers
from treeswarm_client.gateway.openai.routes import openai_routes
from treeswarm_client.gateway.openai.tokenize import tokenize_routes
from treeswarm_client.gateway.responses.routes import responses_routes

log = logging.getLogger(__name__)

DESCRIPTION = "OpenAI's HTTP API over a swarm of nodes that each host some blocks of one model."
# A comment in a stream of server-sent events.
KEEPALIVE = ": nothing new\n\n"
NOT_FOUND, NOT_ALLOWED = 404, 405
# Number of characters of a path that an error quotes.
LONGEST_PATH = 80
ANTHROPIC_PATH = "/v1/messages"
API_ROUTES = (
    "GET /v1/models", "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses", "POST /v1/messages",
    "POST /tokenize", "POST /detokenize",
)  # fmt: skip
TEXT_PARAMS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/messages": "messages",
}
"""Parameter that holds the text, by route."""


def make_app(backend: Backend, *, log_requests: bool = False) -> FastAPI:
    """Return an application with all routes over one backend, which the caller opens."""
    # FastAPI's own pages of the API load their scripts from elsewhere.
    app = FastAPI(title="treeswarm", version=__version__, description=DESCRIPTION, docs_url=None, redoc_url=None)
    schema = cache(partial(make_schema, app, needs_key=bool(backend.config.keys.digests)))
    app.openapi = schema  # type: ignore[method-assign]
    app.add_middleware(BodyLimit, max_bytes=backend.config.limits.body_bytes)
    if not backend.config.keys.digests:
        app.add_middleware(LocalHostOnly, host=backend.config.listen.host)
    if backend.config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=backend.config.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(
        RequestCounter, count=lambda path, status: backend.metrics.requests.labels(path, str(status)).inc()
    )
    app.add_middleware(RequestLog, log_requests=log_requests)
    _add_error_handlers(app)
    _add_routes_with_key(app, backend)
    _add_routes_without_key(app, backend)
    return app


def _add_routes_with_key(app: FastAPI, backend: Backend) -> None:
    caller_of = key_check(backend.config.keys)
    needs_key = [Depends(caller_of)]
    for routes in (openai_routes, responses_routes, anthropic_routes, tokenize_routes):
        app.include_router(routes(backend, caller_of))

    @app.get("/metrics", dependencies=needs_key, include_in_schema=False)
    async def metrics() -> Response:
        return Response(backend.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/about", dependencies=needs_key, include_in_schema=False)
    async def about() -> dict[str, Any]:
        return describe_gateway(backend.config, backend.connection.open_client, backend.why_not_ready)

    @app.get("/map/events", dependencies=needs_key, include_in_schema=False)
    async def events() -> Response:
        events = backend.watchers.listen()  # raises Busy before a status is sent
        return StreamingResponse(_map_events(events), media_type="text/event-stream", headers=EVENT_HEADERS)


def _add_routes_without_key(app: FastAPI, backend: Backend) -> None:
    """Add the routes that need no key, because they reveal nothing about callers."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Report that the process runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Report with 200 or 503 whether the swarm is complete, as far as the gateway knows."""
        backend.check_ready()
        return {"status": "ready"}

    @app.get("/", include_in_schema=False)
    async def front(request: Request) -> Response:
        return front_page(request)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return docs_page()

    @app.get("/map/", include_in_schema=False)
    async def swarm_map() -> Response:
        return map_page()

    # Mounted after the routes of the page and its events, which it would otherwise hide.
    app.mount("/map", make_files_app("web"), name="map")
    app.mount("/pages", make_files_app("pages"), name="pages")


async def _map_events(events: AsyncGenerator[MapEvent | None, None]) -> AsyncIterator[str]:
    async with aclosing(events):
        async for event in events:
            yield KEEPALIVE if event is None else data_frame(event)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(SwarmError)
    async def swarm_error(request: Request, error: SwarmError) -> Response:
        return _respond(request, failure_of(error, TEXT_PARAMS.get(request.url.path)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _respond(request, Failure(400, "invalid_request_error", str(error.errors()[0]["msg"])))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == NOT_FOUND and error.detail == "Not Found":
            return _respond(request, describe_missing(request.method, request.url.path))
        if error.status_code == NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{request.method} {request.url.path[:LONGEST_PATH]} is not served here: use {allowed}"
            return _respond(request, Failure(error.status_code, "invalid_request_error", message))
        return _respond(request, Failure(error.status_code, "invalid_request_error", str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("request %s failed unexpectedly", request.state.request_id, exc_info=error)
        response = _respond(request, INTERNAL)
        response.headers.update(id_headers(request.state.request_id))
        return response


def describe_missing(method: str, path: str) -> Failure:
    """Return the answer to a request for a path that is not served: it says what is.  Pure."""
    root = path.rstrip("/") == "/v1"
    problem = "/v1 is the base URL of OpenAI's API" if root else f"{method} {path[:LONGEST_PATH]} is not served here"
    message = f"{problem}: there are {', '.join(API_ROUTES)}; /docs describes them"
    return Failure(NOT_FOUND, "invalid_request_error", message)


def _respond(request: Request, failure: Failure) -> Response:
    """Return the response for a failure, in the form of the API that the request is for."""
    # A message may quote what a caller sent, and JSON can carry lone surrogates, which UTF-8 cannot.
    failure = replace(failure, message=failure.message.encode("utf-8", "replace").decode())
    body = failure.body
    if request.url.path.startswith(ANTHROPIC_PATH):
        body = error_body(failure, request.state.request_id)
    return JSONResponse(body, failure.status, failure.headers)
