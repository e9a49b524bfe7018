"""The gateway's HTTP face."""

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from treeswarm import __version__
from treeswarm.errors import SwarmError
from treeswarm_client.gateway.answers import AnswerMetadata, AnswerWriter, ChatWriter, CompletionWriter
from treeswarm_client.gateway.backend import Backend, PreparedRequest
from treeswarm_client.gateway.errors import Failure, NoSuchModel, WrongKey, failure_of
from treeswarm_client.gateway.events import FinishEvent, GenerationEvent, TokenEvent, count_usage, drain
from treeswarm_client.gateway.middleware import BodyLimit, LocalHostOnly, RequestCounter, run_unless_disconnected
from treeswarm_client.gateway.page import front_page, make_map_app
from treeswarm_client.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    parse_chat_request,
    parse_completion_request,
)

log = logging.getLogger(__name__)

INTERNAL = Failure(500, "server_error", "an internal error: the gateway's log tells more")
EVENTS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
QUIET = ": nothing new\n\n"


def make_app(backend: Backend) -> FastAPI:
    """All routes over one backend, which whoever serves it opens."""
    app = FastAPI(title="treeswarm", version=__version__)
    app.add_middleware(BodyLimit, most=backend.config.limits.body_bytes)
    if not backend.config.keys.digests:
        app.add_middleware(LocalHostOnly, host=backend.config.listen.host)
    if backend.config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=backend.config.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(
        RequestCounter, tell=lambda path, status: backend.metrics.requests.labels(path, str(status)).inc()
    )
    _translate_errors(app)
    _add_openai(app, backend)
    _add_operator(app, backend)
    return app


def _add_openai(app: FastAPI, backend: Backend) -> None:
    names = backend.config.model_names

    async def may_ask(request: Request) -> bytes:
        caller = backend.config.keys.caller(request.headers.get("authorization"))
        if caller is None:
            raise WrongKey("this gateway asks for an API key: send `Authorization: Bearer KEY` with one of its keys")
        return caller

    def served(model: str) -> None:
        if model not in names:
            raise NoSuchModel(f"the model '{model}' is not served here: ask for {' or '.join(names)}")

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "swarm"}

    guarded = [Depends(may_ask)]
    caller_of = Annotated[bytes, Depends(may_ask)]

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in names]}

    @app.get("/v1/models/{model:path}", dependencies=guarded)
    async def model(model: str) -> dict[str, Any]:
        served(model)
        return card(model)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, caller: caller_of, request: Request) -> Response:
        served(asked.model)
        ask = parse_chat_request(asked, backend.config.limits)
        heading = _heading("chatcmpl", backend)
        job = await backend.prepare(ask, caller)
        return await _answer(backend, job, ChatWriter(heading, backend.client.decode, ask.logprobs), request)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, caller: caller_of, request: Request) -> Response:
        served(asked.model)
        ask = parse_completion_request(asked, backend.config.limits)
        heading = _heading("cmpl", backend)
        job = await backend.prepare(ask, caller)
        return await _answer(backend, job, CompletionWriter(heading, backend.client.decode, ask.logprobs), request)

    @app.get("/metrics", dependencies=guarded, include_in_schema=False)
    async def metrics() -> Response:
        return Response(backend.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/map/events", dependencies=guarded, include_in_schema=False)
    async def events() -> Response:
        events = backend.watchers.listen()  # where too many watch, it says so before there is a status
        return StreamingResponse(_map_events(events), media_type="text/event-stream", headers=EVENTS)


def _add_operator(app: FastAPI, backend: Backend) -> None:
    """What needs no key: it tells nothing of anybody."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """The swarm is whole, as far as is known: 200, or 503."""
        backend.check_ready()
        return {"status": "ready"}

    @app.get("/", include_in_schema=False)
    async def front(request: Request) -> Response:
        return front_page(request)

    # After the route of its events, which would never be reached otherwise.
    app.mount("/map", make_map_app(), name="map")


async def _answer(backend: Backend, job: PreparedRequest, writer: AnswerWriter, request: Request) -> Response:
    """Whole, or as a stream.  Whoever leaves meanwhile ends the generations."""
    events = backend.work(job)
    if not job.ask.stream:
        if not await run_unless_disconnected(request, drain(events)):
            return Response(status_code=499)
        return JSONResponse(writer.whole(job.runs, count_usage(job.runs, job.ask.n)))
    first: list[GenerationEvent] = []
    # Until the first token a failure still has a status of its own.
    if not await run_unless_disconnected(request, _first(events, first)):
        await events.aclose()
        return Response(status_code=499)
    return StreamingResponse(_stream(events, first, job, writer), media_type="text/event-stream", headers=EVENTS)


async def _first(events: AsyncGenerator[GenerationEvent, None], into: list[GenerationEvent]) -> None:
    into.append(await anext(events))


async def _stream(
    events: AsyncGenerator[GenerationEvent, None],
    first: list[GenerationEvent],
    job: PreparedRequest,
    writer: AnswerWriter,
) -> AsyncIterator[str]:
    """OpenAI's server-sent events, `[DONE]` at the end."""
    async with aclosing(events):
        try:
            for choice in range(len(job.runs)):
                if opening := writer.opening(choice):
                    yield _event(opening)
            for event in first:
                yield _chunk(event, writer)
            async for event in events:
                yield _chunk(event, writer)
            if job.ask.include_usage:
                yield _event(writer.usage(count_usage(job.runs, job.ask.n)))
        except SwarmError as error:
            yield _event(failure_of(error).body)
        except Exception:
            log.exception("a stream failed unexpectedly")
            yield _event(INTERNAL.body)
    yield "data: [DONE]\n\n"


def _chunk(event: GenerationEvent, writer: AnswerWriter) -> str:
    match event:
        case TokenEvent(choice, token):
            return _event(writer.more(choice, token))
        case FinishEvent(choice, finish):
            return _event(writer.closing(choice, finish))


async def _map_events(events: AsyncGenerator[dict[str, Any] | None, None]) -> AsyncIterator[str]:
    async with aclosing(events):
        async for event in events:
            yield QUIET if event is None else _event(event)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _heading(kind: str, backend: Backend) -> AnswerMetadata:
    numerics = backend.client.target.numerics
    fingerprint = f"{numerics.weights[:12]}-{numerics.dtype}"
    return AnswerMetadata(
        f"{kind}-{secrets.token_hex(12)}", int(time.time()), backend.config.model_names[0], fingerprint
    )


def _translate_errors(app: FastAPI) -> None:
    @app.exception_handler(SwarmError)
    async def told(_: Request, error: SwarmError) -> Response:
        return _told(failure_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # The innermost name that is a parameter: pydantic adds the kinds of a union it tried.
        names = [str(part) for part in first["loc"] if part != "body"]
        param = names[0] if names else None
        return _told(Failure(400, "invalid_request_error", f"{'.'.join(names)}: {first['msg']}", None, param))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return _told(Failure(error.status_code, "invalid_request_error", str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        log.error("a request failed unexpectedly", exc_info=error)
        return _told(INTERNAL)


def _told(failure: Failure) -> Response:
    # A message may quote what a caller sent, and JSON brings characters that are none.
    failure = replace(failure, message=failure.message.encode("utf-8", "replace").decode())
    return JSONResponse(failure.body, failure.status, failure.headers)
