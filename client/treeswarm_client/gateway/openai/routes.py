"""The routes of OpenAI's API: models, chats and completions."""

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from treeswarm_client.gateway.access import CallerOf
from treeswarm_client.gateway.answers.serving import answer, check_model, make_metadata, read_json_object
from treeswarm_client.gateway.answers.writer import AnswerWriter
from treeswarm_client.gateway.backend import Backend
from treeswarm_client.gateway.openai.answers import ChatWriter, CompletionWriter
from treeswarm_client.gateway.openai.older_functions import OlderCallsWriter, has_older_functions, with_tools
from treeswarm_client.gateway.openai.requests import parse_chat_request, parse_completion_request
from treeswarm_client.gateway.parameters.documents import body_of
from treeswarm_client.gateway.parameters.parameter import Api

# Header that every request of Anthropic's clients has.
ANTHROPIC_VERSION = "anthropic-version"


def _as_anthropic(model: dict[str, Any]) -> dict[str, Any]:
    """Return a model as Anthropic's clients expect it."""
    created = datetime.fromtimestamp(model["created"], UTC).isoformat()
    return {"type": "model", "display_name": model["id"], "created_at": created, **model}


def openai_routes(backend: Backend, caller_of: CallerOf) -> APIRouter:
    """Return the routes, which need the key that `caller_of` checks."""
    router = APIRouter()
    names = backend.config.model_names
    caller_type = Annotated[bytes, Depends(caller_of)]

    def model_object(name: str) -> dict[str, Any]:
        client = backend.connection.open_client
        return {
            "id": name,
            "object": "model",
            "created": backend.started,
            "owned_by": "swarm",
            "root": backend.config.model_names[0],
            "max_model_len": client.target.max_positions if client is not None else None,
        }

    @router.get("/v1/models", dependencies=[Depends(caller_of)])
    async def models(request: Request) -> dict[str, Any]:
        """List the model, under each of its names."""
        data = [model_object(name) for name in names]
        if ANTHROPIC_VERSION in request.headers:
            return {
                "data": list(map(_as_anthropic, data)),
                "has_more": False,
                "first_id": names[0],
                "last_id": names[-1],
            }
        return {"object": "list", "data": data}

    @router.get("/v1/models/{model:path}", dependencies=[Depends(caller_of)])
    async def model(model: str, request: Request) -> dict[str, Any]:
        """Return the model, or 404 if another one is named."""
        check_model({"model": model}, backend)
        found = model_object(model)
        return _as_anthropic(found) if ANTHROPIC_VERSION in request.headers else found

    @router.post("/v1/chat/completions", openapi_extra=body_of(Api.CHAT))
    async def chat(caller: caller_type, request: Request) -> Response:
        """Continue a conversation in the model's own chat template."""
        body = await read_json_object(request)
        check_model(body, backend)
        is_older = has_older_functions(body)
        parsed = parse_chat_request(with_tools(body) if is_older else body, backend.config.limits)
        metadata = make_metadata("chatcmpl-", backend)
        prepared = await backend.prepare(parsed, caller)
        token_bytes = backend.token_bytes if parsed.answer.logprobs is not None else None
        decode = backend.client.decode if parsed.answer.shows_prompt_logprobs else None
        writer: AnswerWriter = ChatWriter(metadata, parsed.answer.include_usage, token_bytes, decode)
        return await answer(backend, prepared, OlderCallsWriter(writer) if is_older else writer, request)

    @router.post("/v1/completions", openapi_extra=body_of(Api.COMPLETIONS))
    async def completions(caller: caller_type, request: Request) -> Response:
        """Continue texts or token ids, one or several."""
        body = await read_json_object(request)
        check_model(body, backend)
        parsed = parse_completion_request(body, backend.config.limits)
        metadata = make_metadata("cmpl-", backend)
        prepared = await backend.prepare(parsed, caller)
        token_bytes = backend.token_bytes if parsed.answer.logprobs is not None else None
        decode = backend.client.decode if parsed.answer.shows_prompt_logprobs else None
        return await answer(
            backend, prepared, CompletionWriter(metadata, parsed.answer.include_usage, token_bytes, decode), request
        )

    return router
