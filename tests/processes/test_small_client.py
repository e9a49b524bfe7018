"""Without a draft model the client does not load torch."""

import asyncio
import json
import sys

import pytest

from treeswarm_client.local_swarm import LocalSwarm

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
