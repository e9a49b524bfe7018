"""Answers one request: reads its body, runs its generations, and sends the answer whole or as a stream."""

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from treeswarm.errors import SwarmError
from treeswarm_client.gateway.answers.pieces import AnswerSplitter, ChoiceAnswer, Piece, ThoughtPiece
from treeswarm_client.gateway.answers.writer import AnswerMetadata, AnswerWriter
from treeswarm_client.gateway.backend import Backend, PreparedRequest
from treeswarm_client.gateway.errors import INTERNAL, MalformedBody, NoSuchModel, failure_of
from treeswarm_client.gateway.events import FinishEvent, GenerationEvent, TokenEvent, count_usage
from treeswarm_client.gateway.generation_request import InvalidParameter
from treeswarm_client.gateway.middleware import run_unless_disconnected

log = logging.getLogger(__name__)

EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CLIENT_CLOSED_REQUEST = 499
# Number of characters of a caller's Content-Type that an error quotes.
LONGEST_TYPE = 60


async def read_json_object(request: Request) -> dict[str, Any]:
    """Return the JSON object in the body of a request.  Raises MalformedBody."""
    kind = request.headers.get("content-type", "")
    body = await request.body()
    media_type = kind.partition(";")[0].strip().lower()
    if body and not (media_type == "application/json" or media_type.endswith("+json")):
        raise MalformedBody(
            f"the Content-Type is {kind[:LONGEST_TYPE] or 'missing'}: "
            "send a JSON object with the header Content-Type: application/json"
        )
    try:
        content = json.loads(body or b"null", parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")  # as in "Unterminated string starting at"
        raise MalformedBody(f"the body is not JSON: {problem} at character {error.pos}") from None
    except UnicodeDecodeError:
        raise MalformedBody("the body is not JSON: it is not valid UTF-8") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deep: send a flatter JSON object") from None
    except ValueError as error:  # numbers of too many digits, too
        raise MalformedBody(f"the body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise MalformedBody("the body is no JSON object: send one, with the header Content-Type: application/json")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def check_model(body: dict[str, Any], backend: Backend) -> None:
    """Raise InvalidParameter if a body names no model, and NoSuchModel if it names another one."""
    names = backend.config.model_names
    if not isinstance(body.get("model"), str):
        raise InvalidParameter("model", f"model is missing: give {' or '.join(names)}")
    if body["model"] not in names:
        raise NoSuchModel(f"the model '{body['model']}' is not served here: ask for {' or '.join(names)}")


def make_metadata(prefix: str, backend: Backend) -> AnswerMetadata:
    """Return what the objects of a new answer have in common; its id begins with `prefix`."""
    numerics = backend.client.target.numerics
    return AnswerMetadata(
        id=f"{prefix}{secrets.token_hex(12)}",
        created=int(time.time()),
        model=backend.config.model_names[0],
        fingerprint=f"{numerics.weights[:12]}-{numerics.dtype}",
    )


@dataclass(eq=False)
class Answering:
    """One answer while its generations run."""

    prepared: PreparedRequest
    writer: AnswerWriter
    answers: list[ChoiceAnswer] = field(init=False)
    _splitters: list[AnswerSplitter] = field(init=False)

    def __post_init__(self) -> None:
        n, texts = self.prepared.request.n, self.prepared.echoes
        self.answers = [
            ChoiceAnswer(echo=texts[at // n] if texts else "", prompt_ids=run.prompt_ids)
            for at, run in enumerate(self.prepared.runs)
        ]
        self._splitters = [self.prepared.make_splitter(run) for run in self.prepared.runs]

    def begin(self) -> Iterable[dict[str, Any]]:
        """Return the events that open a stream."""
        runs = self.prepared.runs
        return self.writer.begin(self.answers, count_usage(runs, self.prepared.request.n))

    def take(self, event: GenerationEvent) -> list[Piece]:
        """Add what has come to its choice, and return the pieces that are new."""
        answer, splitter = self.answers[event.choice], self._splitters[event.choice]
        answer.prompt_logprobs = self.prepared.runs[event.choice].prompt_logprobs
        match event:
            case TokenEvent(_, token):
                pieces = splitter.add(token.text)
                answer.tokens.append(token)
            case FinishEvent(choice, finish):
                pieces = splitter.end()
                answer.finish, answer.stop = finish, self.prepared.runs[choice].stop_string
        # A token without a piece is part of a mark, or of what the last piece was of.
        is_thought = any(isinstance(piece, ThoughtPiece) for piece in pieces) or (not pieces and answer.is_thinking)
        answer.thought_tokens += is_thought and isinstance(event, TokenEvent)
        for piece in pieces:
            answer.add(piece)
        return pieces

    def go_on(self, event: GenerationEvent) -> Iterable[dict[str, Any]]:
        """Add what has come to its choice, and return the events of a stream for it."""
        sent = self._write(event, self.take(event))
        return self.prepared.traces[event.choice].add_to(sent, event) if self.prepared.traces else sent

    def _write(self, event: GenerationEvent, pieces: list[Piece]) -> Iterable[dict[str, Any]]:
        match event:
            case TokenEvent(choice, token):
                return self.writer.token(choice, token, pieces)
            case FinishEvent(choice, _):
                return self.writer.end_choice(choice, self.answers[choice], pieces)

    def end(self) -> Iterable[dict[str, Any]]:
        """Return the events that end a stream."""
        return self.writer.end(self.answers, count_usage(self.prepared.runs, self.prepared.request.n))

    def whole(self) -> dict[str, Any]:
        """Return the whole answer as one object."""
        return self.writer.whole(self.answers, count_usage(self.prepared.runs, self.prepared.request.n))


async def answer(backend: Backend, prepared: PreparedRequest, writer: AnswerWriter, request: Request) -> Response:
    """Return the answer, whole or as a stream.  A caller who disconnects ends the generations."""
    events = backend.generate(prepared)
    answering = Answering(prepared, writer)
    if not prepared.request.answer.stream:
        if not await run_unless_disconnected(request, _take_all(events, answering)):
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(answering.whole())
    first_events: list[GenerationEvent] = []
    # Until the first event, a failure can still be sent with a status of its own.
    if not await run_unless_disconnected(request, _read_first(events, first_events)):
        await events.aclose()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    stream = _stream(events, first_events, answering)
    return StreamingResponse(stream, media_type="text/event-stream", headers=EVENT_HEADERS)


async def _take_all(events: AsyncGenerator[GenerationEvent, None], answering: Answering) -> None:
    async with aclosing(events):
        async for event in events:
            answering.take(event)


async def _read_first(events: AsyncGenerator[GenerationEvent, None], into: list[GenerationEvent]) -> None:
    into.append(await anext(events))


async def _stream(
    events: AsyncGenerator[GenerationEvent, None], first_events: list[GenerationEvent], answering: Answering
) -> AsyncIterator[str]:
    """Yield the frames of a stream."""
    frame = answering.writer.frame
    async with aclosing(events):
        try:
            for sent in answering.begin():
                yield frame(sent)
            for event in first_events:
                for sent in answering.go_on(event):
                    yield frame(sent)
            async for event in events:
                for sent in answering.go_on(event):
                    yield frame(sent)
            for sent in answering.end():
                yield frame(sent)
        except SwarmError as error:
            for sent in answering.writer.fail(failure_of(error)):
                yield frame(sent)
        except Exception:
            log.exception("a stream failed unexpectedly")
            for sent in answering.writer.fail(INTERNAL):
                yield frame(sent)
    if answering.writer.last_frame:
        yield answering.writer.last_frame
