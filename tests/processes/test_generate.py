"""`swarm generate` and `swarm models` with real nodes: where prompts come from, and where texts go."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from treeswarm_client import SwarmClient
from treeswarm_client.local_swarm import LocalSwarm

pytestmark = pytest.mark.asyncio(loop_scope="module")

BIN = Path(sys.executable).parent
PROMPT = "import os\nimport "


async def swarm(*arguments: str | Path, typed: str | None = None) -> "subprocess.CompletedProcess[str]":
    """`typed` is piped in."""
    return await asyncio.to_thread(
        subprocess.run,
        [BIN / "swarm", *arguments],
        input="" if typed is None else typed,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def of(nodes: LocalSwarm) -> list[str]:
    return ["--model", "demo", "--peers", nodes.peers, "--draft", "ngram", "--max-new-tokens", "12"]


async def test_a_prompt_is_an_argument_a_file_or_what_is_piped_in(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="ngram") as client:
        expected = (await client.generate(PROMPT, max_new_tokens=12)).text
    file = tmp_path / "prompt.txt"
    file.write_text(f"{PROMPT}\n")
    asked = [
        await swarm("generate", PROMPT, *of(three_nodes)),
        await swarm("generate", "-", *of(three_nodes), typed=f"{PROMPT}\n"),
        await swarm("generate", *of(three_nodes), typed=PROMPT),
        await swarm("generate", "--prompt-file", file, *of(three_nodes)),
    ]
    for done in asked:
        assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr
        assert "12 tokens in" in done.stderr


async def test_a_stop_text_ends_it(three_nodes: LocalSwarm) -> None:
    whole = (await swarm("generate", PROMPT, *of(three_nodes))).stdout
    stop = whole[5:8]
    done = await swarm("generate", PROMPT, *of(three_nodes), "--stop", "never met", "--stop", stop, "--json")
    result = json.loads(done.stdout)
    assert result["text"] == whole[: whole.index(stop)]
    assert result["finish_reason"] == "stop"


async def test_samples_side_by_side_are_those_of_the_library(three_nodes: LocalSwarm) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="ngram") as client:
        runs = await client.generate_many(PROMPT, n=3, max_new_tokens=12, temperature=0.9, seed=5)
    flags = [*of(three_nodes), "--n", "3", "--temperature", "0.9", "--seed", "5"]
    told = [json.loads(line) for line in (await swarm("generate", PROMPT, *flags, "--json")).stdout.splitlines()]
    assert [(one["sample"], one["text"]) for one in told] == [(i, run.text) for i, run in enumerate(runs)]
    shown = await swarm("generate", PROMPT, *flags)
    assert shown.stdout == "".join(f"--- sample {i} of 3\n{run.text}\n" for i, run in enumerate(runs))


async def test_prompts_of_a_file_are_answered_in_their_order(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    prompts = ["x = ", "y " * 3000, PROMPT, "def f("]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    done = await swarm("generate", "--prompts-file", file, *of(three_nodes))
    assert done.returncode == 1
    assert done.stderr.startswith("swarm: prompt 1: ")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["prompt"] for one in told] == prompts
    assert "context is 2048" in told[1]["error"]["message"]
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="ngram") as client:
        for number in (0, 2, 3):
            alone = await client.generate(prompts[number], max_new_tokens=12)
            assert told[number]["token_ids"] == alone.token_ids
            assert "error" not in told[number]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x"], "swarm-node demo"),
        (["generate", "x", "--peers", "127.0.0.1:1"], "swarm models"),
        (["generate", "--model", "demo", "--peers", "127.0.0.1:1"], "the prompt is empty"),
        (["generate", "x", "--n", "0", "--model", "demo", "--peers", "127.0.0.1:1"], "at least 1"),
        (["generate", "x", "--prompts-file", "y", "--peers", "127.0.0.1:1"], "leave PROMPT"),
        (["generate", "x", "--n", "2", "--explain", "--peers", "127.0.0.1:1"], "leave --n"),
        (["chat", "--model", "demo"], "swarm-node demo"),
        (["models"], "swarm-node demo"),
        (["models", "--peers", "127.0.0.1:1"], "check the address"),
        (["status"], "swarm-node demo"),
    ],
    ids=range(10),
)
async def test_what_lacks_is_told_with_the_next_step(three_nodes: LocalSwarm, arguments: list[str], words: str) -> None:
    if "the prompt is empty" in words:
        arguments = [three_nodes.peers if word == "127.0.0.1:1" else word for word in arguments]
    done = await swarm(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


async def test_an_unknown_model_is_told_what_is_served(three_nodes: LocalSwarm) -> None:
    done = await swarm("generate", "x", "--model", "dmeo", "--peers", three_nodes.peers)
    assert done.returncode == 1
    assert "did you mean 'demo'?" in done.stderr
    assert "(this swarm serves demo)" in done.stderr


async def test_models_are_listed_with_their_gaps(three_nodes: LocalSwarm) -> None:
    done = await swarm("models", "--peers", three_nodes.peers)
    assert done.returncode == 0, done.stderr
    # Less room may be free: a record can be a minute old, from when somebody else's session was open.
    shown = " ".join(done.stdout.splitlines()[1].split())
    assert re.fullmatch(r"demo 8 whole float32 none 3 2048 \d+ of 16384", shown)
    some = ",".join(node.address for node in three_nodes.nodes[:2])
    done = await swarm("models", "--peers", some, "--json")
    assert done.returncode == 1
    (model,) = json.loads(done.stdout)["models"]
    assert model["classes"][0]["gaps"] == [three_nodes.nodes[2].ready["blocks"]]
