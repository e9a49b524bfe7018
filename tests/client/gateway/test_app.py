"""The gateway's routes within this process, without any nodes."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urljoin

import httpx2
import pytest

from treeswarm.errors import Unreachable
from treeswarm.protocol.address import Address
from treeswarm_client.client import SwarmClient
from treeswarm_client.gateway.app import make_app
from treeswarm_client.gateway.backend import Backend
from treeswarm_client.gateway.config import ApiKeys, GatewayConfig, GatewayLimits
from treeswarm_client.gateway.generation_request import Unsupported
from treeswarm_client.gateway.openai.requests import parse_completion_request

KEY = "sk-a-key-for-tests"
NO_KEYS = ApiKeys()
LIMITS = GatewayLimits(body_bytes=1000)


def backend(keys: ApiKeys = NO_KEYS) -> Backend:
    def fail() -> SwarmClient:
        raise Unreachable("there is no swarm here")

    return Backend(GatewayConfig(("demo",), Address("127.0.0.1", 8000), keys, limits=LIMITS), fail)


def http(gateway: Backend, host: str = "127.0.0.1:8000") -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(make_app(gateway), raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url=f"http://{host}")


REQUEST = {"model": "demo", "prompt": "x"}


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "localhost", "[::1]:8000", "127.0.0.1"])
async def test_without_keys_local_host_names_are_answered(host: str) -> None:
    async with http(backend(), host) as client:
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.1:8000"])
async def test_without_keys_other_host_names_are_refused(host: str) -> None:
    async with http(backend(), host) as client:
        answer = await client.get("/map/events")
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "invalid_request_error")
    async with http(backend(ApiKeys.of([KEY])), host) as client:
        assert (await client.get("/health")).status_code == 200


async def test_front_page_links_work_and_404_is_an_openai_error() -> None:
    async with http(backend(ApiKeys.of([KEY]))) as client:
        page = await client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "/v1" in page.text
        links = set(re.findall(r'(?:href|src)="([^"]+)"', page.text))
        links.remove("#new")  # within the page
        assert {"map/", "docs", "pages/chat/main.js"} < links
        statuses = {link: (await client.get(f"/{link}".replace("/./", "/"))).status_code for link in links}
        assert statuses == dict.fromkeys(links, 200)
        for accept in ("*/*", "application/json"):
            answer = await client.get("/", headers={"Accept": accept})
            assert (answer.status_code, answer.json()["map"], answer.json()["openai"]) == (200, "/map/", "/v1")
            assert answer.json()["docs"] == "/docs"
        nowhere = await client.get("/nowhere", headers={"Accept": "text/html"})
        assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "invalid_request_error")


async def test_front_page_is_told_of_the_gateway_with_a_key() -> None:
    async with http(backend(ApiKeys.of([KEY]))) as client:
        assert (await client.get("/about")).status_code == 401
        answer = await client.get("/about", headers={"Authorization": f"Bearer {KEY}"})
        known = answer.json()
        assert (known["model"], known["locked"], known["ready"]) == ("demo", True, False)
        assert known["why"] == "the gateway has just begun to look for nodes"
        # The page offers the settings that requests may have.
        assert {"temperature", "presence_penalty", "max_tokens"} < set(known["parameters"])
        assert "prompt" not in known["parameters"]


async def test_schema_says_what_is_really_answered() -> None:
    """The page of the API loads nothing from elsewhere, and the schema has OpenAI's errors in place of FastAPI's."""
    async with http(backend()) as client:
        page = await client.get("/docs")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "://" not in page.text
        assert (await client.get("/redoc")).status_code == 404
        schema = (await client.get("/openapi.json")).json()
    routes = [route for methods in schema["paths"].values() for route in methods.values()]
    assert len(routes) == 11
    assert all(route["description"] and set(route["responses"]) == {"200", "default"} for route in routes)
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert all("description" in field for name, field in fields.items() if name != "stream_options")
    assert schema["x-needs-key"] is False
    assert "security" not in schema
    async with http(backend(ApiKeys.of([KEY]))) as client:
        assert (await client.get("/openapi.json")).json()["security"] == [{"key": []}]


async def test_large_body_is_413_with_or_without_a_length() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    async with http(backend()) as client:
        json_type = {"Content-Type": "application/json"}
        for body in (b" " * 3000, chunks()):
            answer = await client.post("/v1/completions", content=body, headers=json_type)
            assert (answer.status_code, "more than 1000 bytes" in answer.text) == (413, True)


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b'{"model": "demo"}', "application/x-www-form-urlencoded", "the Content-Type is application/x-www-form-url"),
        (b'{"model": "demo"}', "", "the Content-Type is missing: send a JSON object with the header Content-Type: app"),
        (
            b'{"model": "demo", "prompt}',
            "application/json",
            "the body is not JSON: Unterminated string starting at character 18",
        ),
        (b'{"model": "demo", "prompt": }', "application/json", "the body is not JSON: Expecting value at character 28"),
        (b"[1]", "application/json", "the body is no JSON object: send one"),
        (b"", "application/json", "the body is no JSON object: send one"),
    ],
    ids=range(6),
)
async def test_body_that_is_no_json_object_is_named(body: bytes, content_type: str, message: str) -> None:
    async with http(backend()) as client:
        headers = {"Content-Type": content_type} if content_type else {}
        answer = await client.post("/v1/completions", content=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"][: len(message)], error["param"]) == (400, message, None)


async def test_lone_surrogates_get_an_error_message() -> None:
    async with http(backend()) as client:
        for body in ({"model": "\ud800", "prompt": "x"}, {"model": "demo", "prompt": "x", "\udfff": 1}):
            answer = await client.post(
                "/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
            )
            assert answer.status_code in (400, 404)
            assert answer.json()["error"]["message"]


async def test_internal_error_is_counted() -> None:
    gateway = backend()
    gateway.check_ready = lambda: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    async with http(gateway) as client:
        answer = await client.get("/ready")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert 'endpoint="/ready",status="500"' in gateway.metrics.text().decode()


async def test_missing_swarm_is_503() -> None:
    async with http(backend()) as client:
        assert (await client.get("/ready")).status_code == 503
        answer = await client.post("/v1/completions", json=REQUEST)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


@pytest.mark.parametrize(
    "prompt", [[], {}, None, 5, [{}] * 50, [[]], [1, "x"], ["x"] * 17, [[1.5]], [True], [["x"]]], ids=range(11)
)
async def test_invalid_prompt_gets_a_short_error(prompt: Any) -> None:
    async with http(backend()) as client:
        answer = await client.post("/v1/completions", json={"model": "demo", "prompt": prompt})
    assert answer.status_code == 400
    assert len(answer.text) < 400


def parse(prompt: Any) -> tuple[Any, ...]:
    return parse_completion_request({"model": "demo", "prompt": prompt}, GatewayLimits()).prompts


def test_prompts_are_texts_or_ids_or_lists_of_either() -> None:
    assert parse("x") == ("x",)
    assert parse([1, 2]) == ((1, 2),)
    assert parse(["x", [3]]) == ("x", (3,))
    with pytest.raises(Unsupported, match="at most 16"):
        parse(["x"] * 17)


async def test_pages_share_one_shell_whose_links_work() -> None:
    async with http(backend()) as client:
        heads = set()
        for path in ("/", "/docs", "/map/"):
            page = await client.get(path, headers={"Accept": "text/html"})
            assert (page.status_code, page.text.count("<!doctype html>"), "$" in page.text) == (200, 1, False)
            for link in re.findall(r'(?:href|src)="([^"]+)"', page.text):
                answer = await client.get(urljoin(f"http://127.0.0.1:8000{path}", link))
                assert answer.status_code == (503 if link == "ready" else 200), (path, link)
            assert len(set(re.findall(r' id="([^"]+)"', page.text))) == page.text.count(' id="')
            heads.add(re.sub(r'"(?:\.\./)+', '"', page.text.partition("<title>")[0]))
        assert len(heads) == 1
        assert (await client.get("/map")).headers["location"].endswith("/map/")
