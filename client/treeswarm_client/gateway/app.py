"""The gateway's HTTP routes."""

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from functools import cache, partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from treeswarm import __version__
from treeswarm.errors import SwarmError
from treeswarm_client.gateway.backend import Backend, PreparedRequest
from treeswarm_client.gateway.browser.page import (
    describe_gateway,
    docs_page,
    front_page,
    make_files_app,
    make_schema,
    map_page,
)
from treeswarm_client.gateway.browser.watchers import MapEvent
from treeswarm_client.gateway.errors import Failure, NoSuchModel, WrongKey, failure_of, failure_of_body
from treeswarm_client.gateway.events import FinishEvent, GenerationEvent, TokenEvent, count_usage, drain
from treeswarm_client.gateway.middleware import BodyLimit, LocalHostOnly, RequestCounter, run_unless_disconnected
from treeswarm_client.gateway.openai.answers import AnswerMetadata, AnswerWriter, ChatWriter, CompletionWriter
from treeswarm_client.gateway.openai.requests import (
    ChatRequest,
    CompletionRequest,
    parse_chat_request,
    parse_completion_request,
)

log = logging.getLogger(__name__)

INTERNAL = Failure(500, "server_error", "an internal error occurred: see the gateway's log")
DESCRIPTION = "OpenAI's HTTP API over a swarm of nodes that each host some blocks of one model."
EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# A comment in a stream of server-sent events.
KEEPALIVE = ": nothing new\n\n"
CLIENT_CLOSED_REQUEST = 499
NOT_FOUND, NOT_ALLOWED = 404, 405
# Number of characters of a path that an error quotes.
LONGEST_PATH = 80
API_ROUTES = ("GET /v1/models", "POST /v1/chat/completions", "POST /v1/completions")
TEXT_PARAMS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
"""Parameter that holds the text, by route."""


def make_app(backend: Backend) -> FastAPI:
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
    _add_error_handlers(app)
    _add_routes_with_key(app, backend)
    _add_routes_without_key(app, backend)
    return app


def _add_routes_with_key(app: FastAPI, backend: Backend) -> None:
    names = backend.config.model_names

    async def check_key(request: Request) -> bytes:
        caller = backend.config.keys.caller(request.headers.get("authorization"))
        if caller is None:
            raise WrongKey("this gateway needs an API key: send `Authorization: Bearer KEY` with one of its keys")
        return caller

    def check_model(model: str) -> None:
        if model not in names:
            raise NoSuchModel(f"the model '{model}' is not served here: ask for {' or '.join(names)}")

    def model_object(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "swarm"}

    needs_key = [Depends(check_key)]
    caller_of = Annotated[bytes, Depends(check_key)]

    @app.get("/v1/models", dependencies=needs_key)
    async def models() -> dict[str, Any]:
        """List the model, under each of its names."""
        return {"object": "list", "data": [model_object(name) for name in names]}

    @app.get("/v1/models/{model:path}", dependencies=needs_key)
    async def model(model: str) -> dict[str, Any]:
        """Return the model, or 404 if another one is named."""
        check_model(model)
        return model_object(model)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, caller: caller_of, http_request: Request) -> Response:
        """Continue a conversation in the model's own chat template."""
        check_model(body.model)
        request = parse_chat_request(body, backend.config.limits)
        metadata = _make_metadata("chatcmpl", backend)
        prepared = await backend.prepare(request, caller)
        writer = ChatWriter(metadata, backend.client.decode, request.logprobs)
        return await _answer(backend, prepared, writer, http_request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, caller: caller_of, http_request: Request) -> Response:
        """Continue texts or token ids, one or several."""
        check_model(body.model)
        request = parse_completion_request(body, backend.config.limits)
        metadata = _make_metadata("cmpl", backend)
        prepared = await backend.prepare(request, caller)
        writer = CompletionWriter(metadata, backend.client.decode, request.logprobs)
        return await _answer(backend, prepared, writer, http_request)

    @app.get("/metrics", dependencies=needs_key, include_in_schema=False)
    async def metrics() -> Response:
        return Response(backend.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/about", dependencies=needs_key, include_in_schema=False)
    async def about() -> dict[str, Any]:
        return describe_gateway(backend.config, backend.connection.open_client)

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


async def _answer(backend: Backend, prepared: PreparedRequest, writer: AnswerWriter, http_request: Request) -> Response:
    """Return the answer, whole or as a stream.  A caller who disconnects ends the generations."""
    events = backend.generate(prepared)
    if not prepared.request.stream:
        if not await run_unless_disconnected(http_request, drain(events)):
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(writer.answer(prepared.runs, count_usage(prepared.runs, prepared.request.n)))
    first_events: list[GenerationEvent] = []
    # Until the first event, a failure can still be sent with a status of its own.
    if not await run_unless_disconnected(http_request, _read_first(events, first_events)):
        await events.aclose()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    stream = _stream(events, first_events, prepared, writer)
    return StreamingResponse(stream, media_type="text/event-stream", headers=EVENT_HEADERS)


async def _read_first(events: AsyncGenerator[GenerationEvent, None], into: list[GenerationEvent]) -> None:
    into.append(await anext(events))


async def _stream(
    events: AsyncGenerator[GenerationEvent, None],
    first_events: list[GenerationEvent],
    prepared: PreparedRequest,
    writer: AnswerWriter,
) -> AsyncIterator[str]:
    """Yield OpenAI's server-sent events, `[DONE]` at the end."""
    async with aclosing(events):
        try:
            for choice in range(len(prepared.runs)):
                if chunk := writer.first_chunk(choice):
                    yield _as_sse(chunk)
            for event in first_events:
                yield _as_sse(_make_chunk(event, writer))
            async for event in events:
                yield _as_sse(_make_chunk(event, writer))
            if prepared.request.include_usage:
                yield _as_sse(writer.usage_chunk(count_usage(prepared.runs, prepared.request.n)))
        except SwarmError as error:
            yield _as_sse(failure_of(error).body)
        except Exception:
            log.exception("a stream failed unexpectedly")
            yield _as_sse(INTERNAL.body)
    yield "data: [DONE]\n\n"


def _make_chunk(event: GenerationEvent, writer: AnswerWriter) -> dict[str, Any]:
    match event:
        case TokenEvent(choice, token):
            return writer.token_chunk(choice, token)
        case FinishEvent(choice, finish):
            return writer.finish_chunk(choice, finish)


async def _map_events(events: AsyncGenerator[MapEvent | None, None]) -> AsyncIterator[str]:
    async with aclosing(events):
        async for event in events:
            yield KEEPALIVE if event is None else _as_sse(event)


def _as_sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _make_metadata(kind: str, backend: Backend) -> AnswerMetadata:
    numerics = backend.client.target.numerics
    return AnswerMetadata(
        id=f"{kind}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=backend.config.model_names[0],
        fingerprint=f"{numerics.weights[:12]}-{numerics.dtype}",
    )


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(SwarmError)
    async def swarm_error(request: Request, error: SwarmError) -> Response:
        return _respond(failure_of(error, TEXT_PARAMS.get(request.url.path)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _respond(failure_of_body(error.errors()[0], request.headers.get("content-type")))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == NOT_FOUND and error.detail == "Not Found":
            return _respond(describe_missing(request.method, request.url.path))
        if error.status_code == NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{request.method} {request.url.path[:LONGEST_PATH]} is not served here: use {allowed}"
            return _respond(Failure(error.status_code, "invalid_request_error", message))
        return _respond(Failure(error.status_code, "invalid_request_error", str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        log.error("a request failed unexpectedly", exc_info=error)
        return _respond(INTERNAL)


def describe_missing(method: str, path: str) -> Failure:
    """Return the answer to a request for a path that is not served: it says what is.  Pure."""
    root = path.rstrip("/") == "/v1"
    problem = "/v1 is the base URL of OpenAI's API" if root else f"{method} {path[:LONGEST_PATH]} is not served here"
    message = f"{problem}: there are {', '.join(API_ROUTES)}; /docs describes them"
    return Failure(NOT_FOUND, "invalid_request_error", message)


def _respond(failure: Failure) -> Response:
    # A message may quote what a caller sent, and JSON can carry lone surrogates, which UTF-8 cannot.
    failure = replace(failure, message=failure.message.encode("utf-8", "replace").decode())
    return JSONResponse(failure.body, failure.status, failure.headers)
