"""`swarm bench proposals`: tokens per traversal with what the tail's speculator proposes, beside other drafters.

It runs the product's own client and nodes in one process on a virtual clock, as `swarm bench virtual-wan` does: so the
tokens per second are those of machines of their own, whatever else this machine does.  Every greedy text must be the
stock model's, and every sampled one that of plain decoding.
"""

import contextlib
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from treeswarm.model_files import read_shape, resolve_model
from treeswarm_bench.bench_client import BenchClient
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.texts import chat_prompts, held_out_prompts, repeated_4grams
from treeswarm_bench.benchmarks.trees import LOOPING
from treeswarm_bench.benchmarks.wan.cells import CELLS
from treeswarm_bench.benchmarks.wan.virtual import VirtualNetwork
from treeswarm_bench.virtual_clock import run_virtually_in_thread
from treeswarm_client.drafters import load_drafter
from treeswarm_client.generation.run import Run
from treeswarm_client.local_swarm import even_cuts
from treeswarm_client.prompt_encoder import load_prompt_encoder
from treeswarm_client.provenance import machine_provenance
from treeswarm_client.reference import stock_greedy

SIZES = (16, 64)
TEMPERATURES = (0.0, 1.0)
DRAFTS = ("tail", "tail+ngram", "ngram")
LINK = next(cell for cell in CELLS if cell.name == "25ms")
SEED = 1


async def bench_proposals(
    setup: BenchSetup,
    *,
    sizes: Sequence[int] = SIZES,
    temperatures: Sequence[float] = TEMPERATURES,
    chat: bool = False,
) -> dict[str, Any]:
    """Return tokens per traversal and per second by drafter, size and temperature; count `mismatches`.

    The prompts are held-out code, or with `chat` questions that the model's chat template writes.
    """
    torch.set_num_threads(1)
    folder = resolve_model(setup.model)
    encoder = load_prompt_encoder(setup.model, folder)
    prompts = chat_prompts(encoder, setup.prompts) if chat else held_out_prompts(encoder, setup.prompts)
    stock = await stock_greedy(folder, prompts, setup.tokens, setup.dtype)
    drafts = [*DRAFTS, *([] if setup.draft in (*DRAFTS, "none", "auto") else [setup.draft])]
    cases = [(temperature, size, draft) for temperature in temperatures for size in sizes for draft in drafts]
    measuring = _measure(setup, prompts, stock.token_ids, cases)
    rows = await run_virtually_in_thread(measuring, work_s=None)
    mismatches = sum(row["mismatches"] for row in rows)
    about = machine_provenance() | setup.model_provenance() | {"speculator": setup.speculator, "dtype": setup.dtype}
    return {"bench": "proposals", "link": LINK.link, "rows": rows, "mismatches": mismatches, "provenance": about}


async def _measure(
    setup: BenchSetup, prompts: list[list[int]], stock: list[list[int]], cases: Sequence[tuple[float, int, str]]
) -> list[dict[str, Any]]:
    """Run every case on one swarm; the virtual clock's loop must be running."""
    network, model = VirtualNetwork.of(LINK, 1.0), resolve_model(setup.model)
    async with contextlib.AsyncExitStack() as stack:
        spans = even_cuts(read_shape(model).blocks, setup.nodes)
        nodes = [await stack.enter_async_context(network.node(setup, span, 1.0)) for span in spans]
        transport = network.transport()
        stack.push_async_callback(transport.close)
        client = await stack.enter_async_context(
            BenchClient(
                model=setup.model,
                peers=",".join(node.address for node in nodes),
                draft="none",
                prefix_scope="none",
                drive="self",
                transport=transport,
                clock=network.loop.clock,
            )
        )
        generate = partial(client.generate, max_new_tokens=setup.tokens, ignore_eos=True, seed=SEED)
        plain: dict[float, list[list[int]]] = {0.0: stock}
        rows = []
        for temperature, size, draft in cases:
            if temperature not in plain:
                texts = [await generate(prompt, tree_size=0, temperature=temperature) for prompt in prompts]
                plain[temperature] = [run.token_ids for run in texts]
            client.use_drafter(load_drafter(draft, model))
            runs = [await generate(prompt, tree_size=size, temperature=temperature) for prompt in prompts]
            figures = {"draft": draft, "size": size, "temperature": temperature}
            rows.append(figures | _figures(runs, plain[temperature]))
        return rows


def _figures(runs: Sequence[Run], expected: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return what some runs came to; the prefill's traversal, which has no tree, does not count."""
    stats = [run.stats for run in runs if run.stats is not None]
    counts = [(each.committed - 1, each.traversals - 1) for each in stats]
    repeats = [repeated_4grams(run.token_ids) for run in runs]
    novel = [count for count, repeat in zip(counts, repeats, strict=True) if repeat < LOOPING]
    return {
        "tokens_per_traversal": _ratio(counts),
        "novel_tokens_per_traversal": _ratio(novel),
        "novel_texts": len(novel),
        "tokens_per_s": statistics.median(each.tokens_per_second for each in stats),
        "draft_s": statistics.fmean(each.time.draft / max(1, each.traversals - 1) for each in stats),
        "mismatches": sum(run.token_ids != list(text) for run, text in zip(runs, expected, strict=True)),
    }


def _ratio(counts: Sequence[tuple[int, int]]) -> float | None:
    return sum(tokens for tokens, _ in counts) / sum(traversals for _, traversals in counts) if counts else None
