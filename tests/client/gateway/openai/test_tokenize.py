"""Texts and conversations become tokens and texts again, in vLLM's form; models say how long their context is."""

import re
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI
from tests.support.scripted_client import CONTEXT, ScriptedClient, scripted_backend, scripted_http

from treeswarm_client.gateway.app import make_app

TEXT = "def read(self):"


async def post(path: str, **body: Any) -> Any:
    async with scripted_http(ScriptedClient("x")) as http:
        return (await http.post(path, json=body)).json()


async def test_texts_become_tokens_and_texts_again() -> None:
    client = ScriptedClient("x")
    answer = await post("/tokenize", model="demo", prompt=TEXT, return_token_strs=True)
    ids = client.encode(TEXT)
    names = [client.tokenizer.id_to_token(token) for token in ids]
    assert answer == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids, "token_strs": names}
    assert await post("/detokenize", model="demo", tokens=ids) == {"prompt": client.decode(ids)}
    bare = await post("/tokenize", prompt=TEXT, add_special_tokens=False)
    assert (bare["tokens"], bare["token_strs"]) == (client.encode(TEXT, special=False), None)


async def test_conversations_are_counted_as_they_are_generated() -> None:
    client, talk = ScriptedClient("x"), [{"role": "user", "content": TEXT}]
    assert (await post("/tokenize", messages=talk))["tokens"] == client.encode_chat(talk)
    talk.append({"role": "assistant", "content": "pass"})
    answer = await post("/tokenize", messages=talk, continue_final_message=True, add_generation_prompt=False)
    assert answer["tokens"] == client.encode_chat(talk, continue_final_message=True)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "give either prompt or messages"),
        ("/tokenize", {"prompt": 5}, "prompt is 5: give a text"),
        ("/tokenize", {"prompt": "x", "truncate": 4}, "the parameter truncate is not known here"),
        ("/detokenize", {"tokens": [10**6]}, "1000000 is no token id"),
        ("/detokenize", {"tokens": ["x"]}, 'tokens[0] is "x"'),
        ("/detokenize", {}, "tokens is missing"),
    ],
    ids=range(6),
)
async def test_wrong_bodies_are_refused(path: str, body: dict[str, Any], words: str) -> None:
    assert words in (await post(path, **body))["error"]["message"]


async def test_models_say_their_context_and_ids_are_sent_back() -> None:
    http = scripted_http(ScriptedClient("x"))
    api = AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=http)
    model: Any = await api.models.retrieve("demo")
    assert model.max_model_len == CONTEXT
    assert model.created > 1_700_000_000
    answer = await http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert (answer.headers["x-request-id"], answer.headers["request-id"]) == ("mine-1", "mine-1")
    for unsendable in ("a b", "x" * 200, 'é"'):
        answer = await http.get("/v1/models", headers={"x-request-id": unsendable.encode()})
        assert answer.headers["x-request-id"].startswith("req_")


async def test_requests_are_logged_with_their_ids(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(scripted_backend(ScriptedClient("x")), log_requests=True)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
        await http.get("/v1/models/a%0Ab", headers={"x-request-id": "mine-2"})
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("gateway.requests")]
    assert re.fullmatch(r"GET /v1/models/a%0Ab 404 in \d+\.\d{3} s, request mine-2", line)


async def test_embeddings_are_refused_in_words() -> None:
    answer = await post("/v1/embeddings", model="demo", input="x")
    assert "no embeddings" in answer["error"]["message"]
