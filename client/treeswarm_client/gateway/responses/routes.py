"""The route of OpenAI's responses."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from treeswarm_client.gateway.access import CallerOf
from treeswarm_client.gateway.answers.serving import answer, check_model, make_metadata, read_json_object
from treeswarm_client.gateway.backend import Backend
from treeswarm_client.gateway.parameters.documents import body_of
from treeswarm_client.gateway.parameters.parameter import Api
from treeswarm_client.gateway.responses.answers import ResponseWriter
from treeswarm_client.gateway.responses.requests import parse_responses_request


def responses_routes(backend: Backend, caller_of: CallerOf) -> APIRouter:
    """Return the route, which needs the key that `caller_of` checks."""
    router = APIRouter()

    @router.post("/v1/responses", openapi_extra=body_of(Api.RESPONSES))
    async def responses(caller: Annotated[bytes, Depends(caller_of)], request: Request) -> Response:
        """Continue a conversation, as OpenAI's newer API does; nothing of it is stored."""
        body = await read_json_object(request)
        check_model(body, backend)
        parsed = parse_responses_request(body, backend.config.limits)
        metadata = make_metadata("resp_", backend)
        prepared = await backend.prepare(parsed, caller)
        token_bytes = backend.token_bytes if parsed.answer.logprobs is not None else None
        return await answer(backend, prepared, ResponseWriter(metadata, body, token_bytes), request)

    return router
