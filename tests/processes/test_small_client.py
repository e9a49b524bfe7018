"""Without a draft model the client does not load torch."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from tests.support.untrained_head import save_untrained_head

from treeswarm_client.local_swarm import LocalSwarm, local_swarm

HEAVY = {"torch", "transformers", "huggingface_hub"}
PROGRAM = f"""
import sys
from treeswarm_client.cli.main import main
status = main(sys.argv[1:])
print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


async def run_generate(peers: str, *flags: str) -> tuple[dict[str, object], str]:
    """Run `swarm generate --json`; return its output, and which of the heavy modules its process loaded."""
    arguments = ("generate", "import os\nimport sys\nimport ", "--model", "demo", "--peers", peers, "--json", *flags)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return json.loads(output), errors.decode().strip()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("draft", ["ngram", "none"])
async def test_client_without_a_draft_model_does_not_load_torch(three_nodes: LocalSwarm, draft: str) -> None:
    plain, _ = await run_generate(three_nodes.peers, "--tree-size", "0")
    drafted, loaded = await run_generate(three_nodes.peers, "--draft", draft)
    assert loaded == "[]"
    assert drafted["token_ids"] == plain["token_ids"]
    stats = drafted["stats"]
    assert isinstance(stats, dict)
    assert (stats["drafted"] > 0) == (draft == "ngram")


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
async def test_a_tail_that_proposes_makes_torch_needless(tmp_path: Path) -> None:
    """`auto` takes what the tail proposes, although the bundled draft model is there."""
    save_untrained_head(tmp_path)
    async with local_swarm("demo", []) as swarm:
        node = await swarm.start("--blocks", "0:8", "--speculator", str(tmp_path))
        assert node.ready["speculator"] == "autoregressive"
        plain, _ = await run_generate(node.pinned, "--tree-size", "0")
        for draft in ("auto", "tail+ngram", "tail"):
            drafted, loaded = await run_generate(node.pinned, "--draft", draft, "--tree-size", "8")
            assert loaded == "[]"
            assert drafted["token_ids"] == plain["token_ids"]
            choice, stats = drafted["draft"], drafted["stats"]
            assert isinstance(choice, dict)
            assert isinstance(stats, dict)
            assert choice["name"] == ("tail" if draft == "tail" else "tail+ngram")
            assert stats["proposals"] > 0
