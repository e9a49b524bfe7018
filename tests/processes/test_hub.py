"""Real nodes and a client get a model from a hub: each only what it needs, and the text is stock transformers'."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.gguf_models import write_gguf
from tests.support.local_hub import LocalHub, Repository, local_hub
from transformers import AutoModelForCausalLM, AutoTokenizer

from treeswarm.model_files import weight_files
from treeswarm.protocol.spans import Span
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import local_swarm
from treeswarm_client.reference import stock_greedy

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]
TOKENS = 16


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with local_hub() as running:
        running.use_here(tmp_path / "here", monkeypatch)
        for name, value in running.environment(tmp_path / "there").items():
            monkeypatch.setenv(name, value)
        yield running


async def assert_text_is_stock(name: str, spans: list[Span], plain: Path) -> None:
    async with local_swarm(name, spans) as swarm, SwarmClient(model=name, peers=swarm.peers) as client:
        prompt = client.encode("the 7 quick brown foxes")
        stock = await stock_greedy(plain, [prompt], TOKENS, "float32")
        run = await client.generate(prompt, max_new_tokens=TOKENS, tree_size=8, ignore_eos=True)
        assert run.token_ids == stock.token_ids[0]


async def test_model_by_its_id_from_safetensors(hub: LocalHub, random_model: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(random_model).save_pretrained(plain, max_shard_size="50KB")
    AutoTokenizer.from_pretrained(random_model).save_pretrained(plain)
    files = weight_files(plain)
    assert len(files) > 2
    unused = "model-of-no-block.safetensors"
    hub.repositories["org/model"] = Repository({p.name: p.read_bytes() for p in plain.iterdir()} | {unused: b"x"})
    await assert_text_is_stock("org/model", [Span(0, 2), Span(2, 5)], plain)
    assert set(files) <= hub.sent
    assert unused not in hub.sent
    assert not list((tmp_path / "here").rglob("*.safetensors"))  # the client never reads weights


async def test_gguf_file_by_its_name(hub: LocalHub, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", kind="Q8_0")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    hub.repositories["org/repo"] = Repository({"tiny.gguf": file.read_bytes()})
    await assert_text_is_stock("org/repo:tiny.gguf", [Span(0, 1), Span(1, 2)], tmp_path / "plain")
