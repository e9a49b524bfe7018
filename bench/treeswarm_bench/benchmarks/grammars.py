"""`swarm bench grammars`: random JSON schemas on a real model.

Every text must be valid, and the same as without forced runs and by plain decoding.  It counts tokens per traversal
with and without forced runs, and times the masks of trees, in one process on a virtual clock.
"""

import asyncio
import contextlib
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from treeswarm.grammar.compiler import GrammarCompiler
from treeswarm.model_files import load_tokenizer, read_shape, resolve_model
from treeswarm.protocol.spans import Span
from treeswarm.protocol.text_rules import Grammar, TextRules
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.transport.emulated import LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.bench_client import BenchClient
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.wan.virtual import VirtualNetwork
from treeswarm_bench.virtual_clock import VirtualClockLoop, run_virtually_in_thread
from treeswarm_client.drafters import load_drafter
from treeswarm_client.generation.loop import Generation
from treeswarm_client.generation.run import Run, TreeSize
from treeswarm_client.provenance import machine_provenance
from treeswarm_node.engine.edited_logits import unpacked
from treeswarm_node.engine.loaded_stage import ModelInfo

WORDS = ("name", "age", "city", "größe", "colour", "items", "price", "kind", "id", "note", "straße", "名前", "ok")
VALUES = ("red", "blue", "grün", "東京", "yes", "no", "A-17", "one, two", 'say "hi"', "😀")
PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(é|ü){1,3}[a-z]{1,4}$", "^#[0-9a-f]{6}$")
# Schemas on which the ways to decode are compared; the others are only written with forced runs.
COMPARED = 5
TREE = 8
LINK_S = 0.01
# Rows of a usual tree, and vocabularies: the model's own, and as many tokens as Qwen's have.
ROWS, LARGE_VOCABULARY = 64, 151_936
REPEATS = 15


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a random schema of an object, whose texts are bounded."""
    names = chance.sample(WORDS, chance.randint(2, 4))
    properties = {name: _random_part(chance, depth + 1) for name in names}
    required = [name for name in names if chance.random() < 0.8] or names[:1]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _random_part(chance: random.Random, depth: int) -> dict[str, Any]:
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string", "maxLength": chance.randint(4, 16)},
        lambda: {"type": "integer", "minimum": chance.randint(-20, 0), "maximum": chance.randint(1, 500)},
        lambda: {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": chance.choice([0.5, 0.25])},
        lambda: {"enum": chance.sample(VALUES, chance.randint(2, 4))},
        lambda: {"type": "boolean"},
        lambda: {"const": chance.choice(VALUES)},
        lambda: {"type": "string", "pattern": chance.choice(PATTERNS)},
        lambda: {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 9}]},
    ]
    if depth < 3:
        kinds += [
            lambda: random_schema(chance, depth),
            lambda: {"type": "array", "items": _random_part(chance, depth + 1), "minItems": 1, "maxItems": 3},
        ]
    return chance.choice(kinds)()


@dataclass(frozen=True)
class Way:
    """One way to decode."""

    tree_size: TreeSize
    has_runs: bool

    def adapt(self, usual: Generation) -> Generation:
        """Return the loop with or without forced runs."""
        return usual if self.has_runs else replace(usual, longest_run=0)


WAYS = {"forced runs": Way(TREE, True), "without them": Way(TREE, False), "plain": Way(0, False)}


async def bench_grammars(setup: BenchSetup, *, seed: int) -> dict[str, Any]:
    """Write a text for each of `setup.prompts` schemas, which are others for every seed."""
    torch.set_num_threads(1)
    written = await run_virtually_in_thread(_write_all(setup, seed), work_s=None)
    masks = {str(size): time_masks(load_tokenizer(resolve_model(setup.model)), size) for size in _vocabularies(setup)}
    about = machine_provenance() | setup.model_provenance() | {"bench": "grammars", "seed": seed, "draft": "ngram"}
    return about | written | {"masks": masks}


def _vocabularies(setup: BenchSetup) -> list[int]:
    return sorted({read_shape(resolve_model(setup.model)).vocab_size, LARGE_VOCABULARY})


@contextlib.asynccontextmanager
async def _client(setup: BenchSetup) -> AsyncIterator[BenchClient]:
    """Run two nodes and a client that drafts with n-grams."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    network = VirtualNetwork(MemoryNetwork(), LinkShape(LINK_S), loop, 1.0)
    info = ModelInfo.find(setup.model)
    registry, half = MemoryRegistry(info.config_digest), info.shape.blocks // 2
    async with contextlib.AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(network.node(replace(setup, speculator="none"), span, registry=registry))
            for span in (Span(0, half), Span(half, info.shape.blocks))
        ]
        for node in nodes:
            await node.lifecycle.membership.announce()
        client = BenchClient(
            model=setup.model, registry=nodes[0].address, draft="ngram", transport=network.network.transport(),
            clock=loop.clock,
        )  # fmt: skip
        yield await stack.enter_async_context(client)


async def _write_all(setup: BenchSetup, seed: int) -> dict[str, Any]:
    import jsonschema  # noqa: PLC0415 - for this bench alone

    chance = random.Random(seed)
    schemas = [random_schema(chance) for _ in range(setup.prompts)]
    texts, counts = [], {name: [0, 0] for name in WAYS}
    well = finished = 0
    async with _client(setup) as client:
        for number, schema in enumerate(schemas):
            compared = WAYS if number < COMPARED else {"forced runs": WAYS["forced runs"]}
            runs = {name: await _write(client, schema, way, setup.tokens) for name, way in compared.items()}
            if len({tuple(run.token_ids) for run in runs.values()}) != 1:
                raise AssertionError(f"schema {number} has several texts: {json.dumps(schema)}")
            for name, run in runs.items():
                if number < COMPARED:
                    counts[name][0] += len(run.token_ids)
                    counts[name][1] += run.recorder.traversals
            text = runs["forced runs"].text
            texts.append({"schema": schema, "text": text, "finish": runs["forced runs"].finish_reason})
            if runs["forced runs"].finish_reason == "stop":
                finished += 1
                jsonschema.validate(json.loads(text), schema)
                well += 1
    ways = {name: {"tokens": t, "traversals": n, "tokens_per_traversal": t / n} for name, (t, n) in counts.items()}
    return {"schemas": len(schemas), "finished": finished, "valid": well, "ways": ways, "texts": texts}


async def _write(client: BenchClient, schema: dict[str, Any], way: Way, tokens: int) -> Run:
    content = f"Answer in JSON with the members {', '.join(schema['properties'])}."
    prompt = client.encode_chat([{"role": "user", "content": content}]) if client.has_chat_template else content
    rules = TextRules(grammar=Grammar("json_schema", json.dumps(schema)))
    client.use_drafter(load_drafter("ngram", client.folder))  # one that has not seen the text in another way
    with client.adapted(way.adapt):
        return await client.generate(prompt, rules=rules, tree_size=way.tree_size, max_new_tokens=tokens)


def time_masks(tokenizer: Tokenizer, vocab_size: int) -> dict[str, float]:
    """Return milliseconds of processor time of the masks of a tree of ROWS rows, and of what they are applied by.

    A tokenizer with fewer tokens gets made-up ones, each two of its own together.
    """
    compiler = GrammarCompiler.of(widened_tokenizer(tokenizer, vocab_size), vocab_size, "bench")
    chance, masks_ms, first_ms, apply_ms, scores_ms = random.Random(1), [], [], [], []
    logits = torch.zeros(ROWS, vocab_size)
    for _ in range(REPEATS):
        schema = json.dumps(random_schema(chance))
        text = compiler.begin(Grammar("json_schema", schema), [0])
        branches: list[tuple[int, ...]] = [()]
        start = time.thread_time()
        allowed = text.after([], [()])
        first_ms.append((time.thread_time() - start) * 1e3)
        while len(branches) < ROWS:
            parent = chance.choice(branches[-12:])
            found = np.flatnonzero(np.unpackbits(text.after([], [parent]).view(np.uint8)[0], bitorder="little"))
            branches.append((*parent, int(chance.choice(found.tolist())) if len(found) else 0))
        start = time.thread_time()
        allowed = text.after([], branches)
        masks_ms.append((time.thread_time() - start) * 1e3)
        start = time.thread_time()
        excluded = ~unpacked(allowed, vocab_size, logits.device)
        logits.masked_fill_(excluded, -torch.inf)
        apply_ms.append((time.thread_time() - start) * 1e3)
        logits.zero_()
        start = time.thread_time()
        torch.logsumexp(logits, -1)
        scores_ms.append((time.thread_time() - start) * 1e3)
    return {
        "rows": ROWS,
        "first_mask_ms": statistics.median(first_ms),
        "masks_ms": statistics.median(masks_ms),
        "masks_ms_most": max(masks_ms),
        "apply_ms": statistics.median(apply_ms),
        "logsumexp_ms": statistics.median(scores_ms),
    }


def widened_tokenizer(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """Return the tokenizer with pairs of its tokens as further tokens, `size` in all."""
    content = json.loads(tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    chance, known = random.Random(0), list(vocabulary)
    added = {token["content"] for token in content["added_tokens"]}
    while len(vocabulary) < size - 1:
        first, second = chance.choice(known), chance.choice(known)
        if first + second not in vocabulary and not {first, second} & added:
            vocabulary[first + second] = len(vocabulary)
            merges.append([first, second])
    return Tokenizer.from_str(json.dumps(content))
