"""`swarm generate` and `swarm models` with real nodes: sources of prompts, and output of texts."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from treeswarm.model_files import resolve_model
from treeswarm_client import SwarmClient
from treeswarm_client.local_swarm import LocalSwarm

pytestmark = pytest.mark.asyncio(loop_scope="module")

BIN = Path(sys.executable).parent
PROMPT = "import os\nimport "


async def run_swarm(*arguments: str | Path, typed: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run `swarm` with `typed` as its standard input."""
    return await asyncio.to_thread(
        subprocess.run,
        [BIN / "swarm", *arguments],
        input="" if typed is None else typed,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def flags_for(nodes: LocalSwarm) -> list[str]:
    return ["--model", "demo", "--peers", nodes.peers, "--draft", "ngram", "--max-new-tokens", "12"]


async def test_prompt_may_be_an_argument_a_file_or_piped_in(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="ngram") as client:
        expected = (await client.generate(PROMPT, max_new_tokens=12)).text
    file = tmp_path / "prompt.txt"
    file.write_text(f"{PROMPT}\n")
    results = [
        await run_swarm("generate", PROMPT, *flags_for(three_nodes)),
        await run_swarm("generate", "-", *flags_for(three_nodes), typed=f"{PROMPT}\n"),
        await run_swarm("generate", *flags_for(three_nodes), typed=PROMPT),
        await run_swarm("generate", "--prompt-file", file, *flags_for(three_nodes)),
    ]
    for result in results:
        assert (result.returncode, result.stdout) == (0, f"{expected}\n"), result.stderr
        assert "12 tokens in" in result.stderr


async def test_text_has_the_form_that_a_flag_names(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    """Tokens that must follow come together, and a schema that cannot be followed is refused in words."""
    schema, wrong = tmp_path / "schema.json", tmp_path / "wrong.json"
    kinds = {"type": "object", "properties": {"kind": {"enum": ["function", "class"]}}, "required": ["kind"]}
    schema.write_text(json.dumps(kinds | {"additionalProperties": False}))
    wrong.write_text('{"not": {}}')
    formed = await run_swarm("generate", PROMPT, *flags_for(three_nodes), "--json-schema", schema, "--json")
    assert formed.returncode == 0, formed.stderr
    answer = json.loads(formed.stdout)
    assert json.loads(answer["text"])["kind"] in ("function", "class")
    assert answer["finish_reason"] == "stop"
    assert answer["stats"]["tokens_per_traversal"] > 2
    refused = await run_swarm("generate", PROMPT, *flags_for(three_nodes), "--json-schema", wrong)
    assert refused.returncode == 1
    assert 'the grammar cannot be used: Unimplemented keys: ["not"]' in refused.stderr


async def test_chat_template_that_does_not_compile_stops_no_generation(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    folder = shutil.copytree(resolve_model("demo"), tmp_path / "demo")
    (folder / "chat_template.jinja").write_text("{% for %}")
    where = ["--model", folder, "--peers", three_nodes.peers, "--draft", "ngram", "--max-new-tokens", "12"]
    generated, plain = (
        await run_swarm("generate", PROMPT, *where),
        await run_swarm("generate", PROMPT, *flags_for(three_nodes)),
    )
    assert (generated.returncode, generated.stdout) == (0, plain.stdout), generated.stderr


async def test_automatic_choice_of_a_draft_is_said(three_nodes: LocalSwarm) -> None:
    where = ["--model", "demo", "--peers", three_nodes.peers, "--max-new-tokens", "2"]
    chosen = "draft: demo-draft and n-grams from the text, because demo-draft has the tokenizer of demo"
    assert (await run_swarm("generate", PROMPT, *where)).stderr.startswith(f"{chosen}\n")
    result = await run_swarm("generate", PROMPT, *where, "--json")
    assert "draft:" not in result.stderr
    assert json.loads(result.stdout)["draft"] == {
        "name": "demo-draft+ngram",
        "why": "because demo-draft has the tokenizer of demo",
    }
    named = await run_swarm("generate", PROMPT, *where, "--draft", "ngram", "--n", "2", "--json")
    drafts = [json.loads(line)["draft"] for line in named.stdout.splitlines()]
    assert drafts == 2 * [{"name": "ngram", "why": "as named"}]


async def test_stop_text_ends_the_generation(three_nodes: LocalSwarm) -> None:
    whole = (await run_swarm("generate", PROMPT, *flags_for(three_nodes))).stdout
    stop = whole[5:8]
    stops = ["--stop", "never met", "--stop", stop]
    result = json.loads((await run_swarm("generate", PROMPT, *flags_for(three_nodes), *stops, "--json")).stdout)
    assert result["text"] == whole[: whole.index(stop)]
    assert result["finish_reason"] == "stop"


async def test_samples_are_those_of_the_library(three_nodes: LocalSwarm) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="ngram") as client:
        runs = await client.generate_many(PROMPT, n=3, max_new_tokens=12, temperature=0.9, seed=5)
    flags = [*flags_for(three_nodes), "--n", "3", "--temperature", "0.9", "--seed", "5"]
    records = [json.loads(line) for line in (await run_swarm("generate", PROMPT, *flags, "--json")).stdout.splitlines()]
    assert [(record["sample"], record["text"]) for record in records] == [(i, run.text) for i, run in enumerate(runs)]
    printed = await run_swarm("generate", PROMPT, *flags)
    assert printed.stdout == "".join(f"--- sample {i} of 3\n{run.text}\n" for i, run in enumerate(runs))


async def test_prompts_of_a_file_are_answered_in_order(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    prompts = ["x = ", "y " * 3000, PROMPT, "def f("]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    result = await run_swarm("generate", "--prompts-file", file, *flags_for(three_nodes))
    assert result.returncode == 1
    assert result.stderr.startswith("swarm: prompt 1: ")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["prompt"] for record in records] == prompts
    assert "context is 2048" in records[1]["error"]["message"]
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="ngram") as client:
        for number in (0, 2, 3):
            alone = await client.generate(prompts[number], max_new_tokens=12)
            assert records[number]["token_ids"] == alone.token_ids
            assert "error" not in records[number]


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
async def test_missing_input_is_reported_with_the_next_step(
    three_nodes: LocalSwarm, arguments: list[str], words: str
) -> None:
    if "the prompt is empty" in words:
        arguments = [three_nodes.peers if word == "127.0.0.1:1" else word for word in arguments]
    result = await run_swarm(*arguments)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr


async def test_error_for_an_unknown_model_lists_served_ones(three_nodes: LocalSwarm) -> None:
    result = await run_swarm("generate", "x", "--model", "dmeo", "--peers", three_nodes.peers)
    assert result.returncode == 1
    assert "did you mean 'demo'?" in result.stderr
    assert "(this swarm serves demo)" in result.stderr


async def test_models_are_listed_with_their_gaps(three_nodes: LocalSwarm) -> None:
    result = await run_swarm("models", "--peers", three_nodes.peers)
    assert result.returncode == 0, result.stderr
    # Fewer tokens may be free: a record can be a minute old, from a time when another session was open.
    row = " ".join(result.stdout.splitlines()[1].split())
    assert re.fullmatch(r"demo 8 complete float32 none 3 2048 \d+ of 16384", row)
    two_peers = ",".join(node.address for node in three_nodes.nodes[:2])
    result = await run_swarm("models", "--peers", two_peers, "--json")
    assert result.returncode == 1
    (model,) = json.loads(result.stdout)["models"]
    assert model["classes"][0]["gaps"] == [three_nodes.nodes[2].ready["blocks"]]
