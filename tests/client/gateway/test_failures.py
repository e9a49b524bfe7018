"""The gateway under failures: no key, no free slot, no swarm, a node that dies under thirty-two streams."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import openai
import pytest
import pytest_asyncio
from tests.support.gateway_process import KEY, Gateway, gateway
from tests.support.registry_media import free_port

from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import HostCommand, LocalNode, LocalSwarm, even_cuts, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = "class Queue:\n    def __init__(self"
SPANS = even_cuts(8, 2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """A swarm that all tests share; tests that kill nodes start nodes of their own."""
    async with local_swarm("demo", SPANS) as swarm:
        yield swarm


@contextlib.asynccontextmanager
async def killable_tail(listen: str = "127.0.0.1:0") -> AsyncIterator[LocalNode]:
    """Start a node with the last blocks, which a test may kill, to serve beside the shared head."""
    async with local_swarm("demo", SPANS[1:], hosts=[HostCommand(listen=listen)]) as tail:
        yield tail.nodes[0]


async def wait_for_status(served: Gateway, page: str, status: int) -> httpx2.Response:
    """Wait until the page has this status, and return the response."""
    async with httpx2.AsyncClient(base_url=served.url) as http:
        for _ in range(600):
            answer = await http.get(page)
            if answer.status_code == status:
                return answer
            await asyncio.sleep(0.1)
    raise AssertionError(f"{page} is {answer.status_code}: {answer.text}")


async def test_thirty_two_streams_survive_a_killed_node() -> None:
    """Each stream yields the text that it yields alone and without a loss."""
    prompts = [f"def function_{i}(self, value{i}):\n    return" for i in range(32)]
    async with local_swarm("demo", [*SPANS, *SPANS]) as swarm:
        async with SwarmClient(model="demo", peers=swarm.peers, draft="ngram") as library:
            expected = [(await library.generate(prompt, max_new_tokens=16)).text for prompt in prompts]
        async with gateway(swarm.peers, "--draft", "ngram") as served, served.openai() as api:
            chunks, begun = [0] * len(prompts), asyncio.Event()

            async def stream_answer(i: int) -> str:
                stream = await api.completions.create(
                    model="demo", prompt=prompts[i], max_tokens=16, temperature=0, stream=True
                )
                text = ""
                async for chunk in stream:
                    text += chunk.choices[0].text
                    chunks[i] += 1
                    if sum(1 for count in chunks if count >= 2) == len(chunks) // 2:
                        begun.set()
                return text

            answers = asyncio.gather(*map(stream_answer, range(len(prompts))))
            await begun.wait()
            victim = await _busiest(swarm)
            swarm.nodes[victim].process.send_signal(signal.SIGKILL)
            assert list(await answers) == expected
            assert (await served.metrics())["treeswarm_gateway_failovers_total"] > 0


async def _busiest(swarm: LocalSwarm) -> int:
    """Return the index of the node with the most sessions.  A node that is too busy to answer counts as one without."""
    async with SwarmClient(model="demo", peers=swarm.peers, draft="none") as client:
        nodes = await client.describe_nodes()
    sessions = {address.partition("#")[0]: node.sessions for address, node in nodes.items()}
    return max(range(len(swarm.nodes)), key=lambda i: sessions.get(swarm.nodes[i].address, 0))


async def test_only_valid_keys_are_accepted(swarm: LocalSwarm, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"# for tests\n{KEY}   # mine\nanother-key-42\n")
    async with gateway(swarm.peers, "--api-key-file", str(keys)) as served:
        for key in (KEY, "another-key-42"):
            async with served.openai(key) as api:
                assert (await api.models.list()).data[0].id == "demo"
        long = "import os\n" * 60
        cached = []
        for key in (KEY, "another-key-42", KEY):
            async with served.openai(key) as api:
                answer = await api.completions.create(model="demo", prompt=long, max_tokens=2)
                assert answer.usage is not None
                assert answer.usage.prompt_tokens_details is not None
                cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        assert cached[0] == cached[1] == 0 < cached[2], "a key reveals nothing of what another has sent"
        async with served.openai("sk-a-wrong-guess") as api:
            with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY") as refused:
                await api.completions.create(model="demo", prompt=PROMPT)
            assert refused.value.code == "invalid_api_key"
        async with httpx2.AsyncClient(base_url=served.url) as http:
            for page in ("/v1/models", "/metrics", "/map/events"):
                assert (await http.get(page)).status_code == 401
                assert (await http.get(page, headers={"Authorization": KEY})).status_code == 401
            for page in ("/health", "/ready", "/map/"):
                assert (await http.get(page)).status_code == 200


async def test_full_gateway_answers_429_and_recovers(swarm: LocalSwarm) -> None:
    flags = ("--draft", "none", "--max-concurrent", "1", "--max-waiting", "1", "--max-wait", "1")
    async with gateway(swarm.peers, *flags) as served, served.openai() as api:
        stream = await api.completions.create(model="demo", prompt=PROMPT, max_tokens=1500, stream=True)
        await anext(aiter(stream))
        waiting = [
            asyncio.create_task(api.completions.create(model="demo", prompt=PROMPT, max_tokens=4)) for _ in range(3)
        ]
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(answer, openai.RateLimitError) for answer in answers), answers
        messages = sorted(str(answer) for answer in answers)
        assert sum("requests wait already" in message for message in messages) == 2
        assert sum("no free slot within 1 s" in message for message in messages) == 1
        await stream.close()
        for _ in range(100):
            if not (await served.metrics())["treeswarm_gateway_generations"]:
                break
            await asyncio.sleep(0.1)
        answer = await api.completions.create(model="demo", prompt=PROMPT, max_tokens=4)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4


async def test_gateway_may_start_before_its_swarm(swarm: LocalSwarm) -> None:
    later = f"127.0.0.1:{free_port()}"
    peers = f"{swarm.nodes[0].address},{later}"
    async with gateway(peers, "--draft", "none") as served, served.openai() as api:
        assert (await wait_for_status(served, "/ready", 503)).json()["error"]["code"] == "missing_blocks"
        assert (await wait_for_status(served, "/health", 200)).json() == {"status": "ok"}
        with pytest.raises(openai.InternalServerError, match="no node serves blocks 4:8"):
            await api.completions.create(model="demo", prompt=PROMPT)
        async with killable_tail(later):
            await wait_for_status(served, "/ready", 200)
            answer = await api.completions.create(model="demo", prompt=PROMPT, max_tokens=4)
        assert answer.choices[0].finish_reason == "length"


async def test_unfilled_gap_is_503(swarm: LocalSwarm) -> None:
    async with (
        killable_tail() as victim,
        gateway(f"{swarm.nodes[0].address},{victim.address}", "--patience", "1", "--draft", "none") as served,
        served.openai() as api,
    ):
        await wait_for_status(served, "/ready", 200)
        victim.process.send_signal(signal.SIGKILL)
        await victim.process.wait()
        with pytest.raises(openai.InternalServerError) as refused:
            await api.completions.create(model="demo", prompt=PROMPT, max_tokens=4)
        assert refused.value.status_code == 503
        assert "4:8" in str(refused.value)


async def test_broken_stream_ends_with_its_error(swarm: LocalSwarm) -> None:
    async with (
        killable_tail() as victim,
        gateway(f"{swarm.nodes[0].address},{victim.address}", "--patience", "0", "--draft", "none") as served,
        served.openai() as api,
    ):
        stream = await api.completions.create(model="demo", prompt=PROMPT, max_tokens=1000, stream=True)
        with pytest.raises(openai.APIError, match="4:8"):
            async for _ in stream:
                if victim.process.returncode is None:
                    victim.process.send_signal(signal.SIGKILL)


async def test_stopped_gateway_ends_a_stream_with_an_error(swarm: LocalSwarm) -> None:
    async with gateway(swarm.peers, "--draft", "none") as served, served.openai() as api:
        stream = await api.completions.create(model="demo", prompt=PROMPT, max_tokens=1900, stream=True)
        signalled = False
        with pytest.raises(openai.APIError, match="being stopped"):
            async for _ in stream:
                if not signalled:
                    served.process.send_signal(signal.SIGTERM)
                signalled = True
    # Leaving `gateway` has checked that it ended with status 0 and without a traceback.
    async with SwarmClient(model="demo", peers=swarm.peers, draft="none") as library:
        for _ in range(200):
            if not any(node.sessions for node in (await library.describe_nodes()).values()):
                break
            await asyncio.sleep(0.1)
        assert not any(node.sessions for node in (await library.describe_nodes()).values())


async def test_gateway_without_a_swarm_can_be_stopped() -> None:
    async with gateway(f"127.0.0.1:{free_port()}", "--draft", "none") as served:
        await wait_for_status(served, "/ready", 503)
