"""The routes that turn texts into tokens and back, as vLLM has them."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from treeswarm_client.gateway.access import CallerOf
from treeswarm_client.gateway.answers.serving import read_json_object
from treeswarm_client.gateway.backend import Backend
from treeswarm_client.gateway.generation_request import InvalidParameter, Unsupported
from treeswarm_client.gateway.openai.requests import chat_of
from treeswarm_client.gateway.parameters.checks import ListOf, Text, TrueOrFalse, Whole
from treeswarm_client.gateway.parameters.nested import MESSAGES
from treeswarm_client.gateway.parameters.parameter import EVERY_API, Parameter, read_parameters
from treeswarm_client.gateway.parameters.table import HONOURED

MAX_TOKENS = 1 << 20
_OF_CHATS = {"chat_template_kwargs", "continue_final_message", "add_generation_prompt"}

TOKENIZE = (
    Parameter("model", EVERY_API, "name of the model", Text()),
    Parameter("prompt", EVERY_API, "a text", Text()),
    Parameter("messages", EVERY_API, "a conversation, in place of a text", MESSAGES),
    Parameter("add_special_tokens", EVERY_API, "whether a text begins with the tokens of every text", TrueOrFalse()),
    Parameter("return_token_strs", EVERY_API, "whether the answer has the tokens by name", TrueOrFalse()),
    *(parameter for parameter in HONOURED if parameter.name in _OF_CHATS),
)
DETOKENIZE = (
    Parameter("model", EVERY_API, "name of the model", Text()),
    Parameter("tokens", EVERY_API, "token ids", ListOf(Whole(0), "token ids", MAX_TOKENS), required=True),
)


def tokenize_routes(backend: Backend, caller_of: CallerOf) -> APIRouter:
    """Return the routes, which need the key that `caller_of` checks."""
    router = APIRouter(dependencies=[Depends(caller_of)])

    @router.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        """Return the token ids of a text, or of a conversation as the model's template writes it."""
        values = read_parameters(await read_json_object(request), TOKENIZE)
        if ("prompt" in values) == ("messages" in values):
            raise InvalidParameter("prompt", "give either prompt or messages")
        client = backend.client
        if "messages" in values:
            tokens = list(await backend.encode_chat(chat_of(values)))
        else:
            special = values.get("add_special_tokens", True)
            tokens = list(await backend.encode_text(values["prompt"], special=special))
        names = [client.tokenizer.id_to_token(token) for token in tokens]
        return {
            "count": len(tokens),
            "max_model_len": client.target.max_positions,
            "tokens": tokens,
            "token_strs": names if values.get("return_token_strs") else None,
        }

    @router.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        """Return the text of token ids, special tokens included."""
        tokens = read_parameters(await read_json_object(request), DETOKENIZE)["tokens"]
        client = backend.client
        if (largest := max(tokens, default=0)) >= client.target.vocab_size:
            raise InvalidParameter("tokens", f"{largest} is no token id: there are {client.target.vocab_size}")
        return {"prompt": client.decode(tokens)}

    @router.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> None:
        raise Unsupported("model", "there are no embeddings here: nodes send tokens, no hidden states")

    return router
