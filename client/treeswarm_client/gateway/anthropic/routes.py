"""The routes of Anthropic's API: messages, and the number of their tokens."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from treeswarm_client.gateway.access import CallerOf
from treeswarm_client.gateway.answers.serving import answer, check_model, make_metadata, read_json_object
from treeswarm_client.gateway.anthropic.answers import MessageWriter
from treeswarm_client.gateway.anthropic.requests import parse_messages_request
from treeswarm_client.gateway.backend import Backend
from treeswarm_client.gateway.parameters.documents import body_of
from treeswarm_client.gateway.parameters.parameter import Api


def anthropic_routes(backend: Backend, caller_of: CallerOf) -> APIRouter:
    """Return the routes, which need the key that `caller_of` checks."""
    router = APIRouter()
    caller_type = Annotated[bytes, Depends(caller_of)]

    @router.post("/v1/messages", openapi_extra=body_of(Api.MESSAGES))
    async def messages(caller: caller_type, request: Request) -> Response:
        """Continue a conversation, as Anthropic's API does."""
        body = await read_json_object(request)
        check_model(body, backend)
        parsed = parse_messages_request(body, backend.config.limits)
        metadata = make_metadata("msg_", backend)
        return await answer(
            backend, await backend.prepare(parsed, caller), MessageWriter(metadata, parsed.ends.max_tokens), request
        )

    @router.post("/v1/messages/count_tokens", dependencies=[Depends(caller_of)], openapi_extra=body_of(Api.MESSAGES))
    async def count_tokens(request: Request) -> dict[str, Any]:
        """Count the tokens of a conversation, as the model's template writes it."""
        body = await read_json_object(request)
        check_model(body, backend)
        parsed = parse_messages_request(body, backend.config.limits, counts=True)
        (prompt,) = await backend.encode_prompts(parsed)
        return {"input_tokens": len(prompt)}

    return router
