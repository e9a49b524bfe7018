"""`swarm bench proposals`: tokens per traversal and second with what the tail proposes, beside other drafters.

It runs the product's own client and nodes in one process on a virtual clock, as `swarm bench virtual-wan` does: so the
tokens per second are those of machines of their own, whatever else this machine does.  With a flat time, a node's
forward takes that long whatever its rows, as on a GPU that is not full, and a forward of the head as long as one block.
Every greedy text must be the stock model's, and every sampled one that of plain decoding.
"""

import contextlib
import statistics
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from treeswarm.errors import BadRequest
from treeswarm.model_files import read_shape, resolve_model
from treeswarm_bench.bench_client import BenchClient
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.texts import chat_prompts, held_out_prompts, repeated_4grams
from treeswarm_bench.benchmarks.trees import LOOPING
from treeswarm_bench.benchmarks.wan.cells import CELLS, Cell
from treeswarm_bench.benchmarks.wan.virtual import VirtualNetwork
from treeswarm_bench.virtual_clock import run_virtually_in_thread
from treeswarm_client.drafters import load_drafter
from treeswarm_client.generation.run import Run, TreeSize
from treeswarm_client.local_swarm import even_cuts
from treeswarm_client.prompt_encoder import load_prompt_encoder
from treeswarm_client.provenance import machine_provenance
from treeswarm_client.reference import stock_greedy

SIZES = (16, 64)
TEMPERATURES = (0.0, 1.0)
DRAFTS = ("tail", "tail+ngram", "ngram")
PLAIN = "plain"
CELL = "25ms"
SEED = 1


@dataclass(frozen=True)
class Case:
    """One drafter, tree size and temperature."""

    draft: str
    size: TreeSize
    temperature: float


async def bench_proposals(
    setup: BenchSetup,
    *,
    sizes: Sequence[int] = SIZES,
    temperatures: Sequence[float] = TEMPERATURES,
    chat: bool = False,
    cells: Sequence[str] = (CELL,),
    flat_ms: float = 0.0,
) -> dict[str, Any]:
    """Return tokens per traversal and per second by cell, drafter, size and temperature; count `mismatches`.

    Besides `sizes`, each drafter runs with the size that the client chooses, and one row is plain decoding.  The
    prompts are held-out code, or with `chat` questions that the model's chat template writes.  Raises BadRequest if
    there is no such cell.
    """
    by_name = {cell.name: cell for cell in CELLS}
    if unknown := set(cells) - set(by_name):
        raise BadRequest(f"unknown cell '{min(unknown)}': choose from {', '.join(by_name)}")
    chosen = [by_name[name] for name in cells]
    torch.set_num_threads(1)
    folder = resolve_model(setup.model)
    encoder = load_prompt_encoder(setup.model, folder)
    prompts = chat_prompts(encoder, setup.prompts) if chat else held_out_prompts(encoder, setup.prompts)
    stock = await stock_greedy(folder, prompts, setup.tokens, setup.dtype)
    drafts = [*DRAFTS, *([] if setup.draft in (*DRAFTS, "none", "auto") else [setup.draft])]
    chosen_sizes: list[TreeSize] = [*sizes, "auto"]
    cases = []
    for temperature in temperatures:
        cases += [Case(PLAIN, 0, temperature)]
        cases += [Case(draft, size, temperature) for draft in drafts for size in chosen_sizes]
    rows: list[dict[str, Any]] = []
    for cell in chosen:
        measuring = _measure(setup, cell, flat_ms / 1e3, prompts, stock.token_ids, cases)
        rows += await run_virtually_in_thread(measuring, work_s=None)
    mismatches = sum(row["mismatches"] for row in rows)
    about = machine_provenance() | setup.model_provenance() | {"speculator": setup.speculator, "dtype": setup.dtype}
    return {"bench": "proposals", "flat_ms": flat_ms, "rows": rows, "mismatches": mismatches, "provenance": about}


async def _measure(
    setup: BenchSetup,
    cell: Cell,
    flat_s: float,
    prompts: list[list[int]],
    stock: list[list[int]],
    cases: Sequence[Case],
) -> list[dict[str, Any]]:
    """Run every case on one swarm; the virtual clock's loop must be running."""
    network, model = VirtualNetwork.of(cell, 1.0, flat_s), resolve_model(setup.model)
    expected: dict[float, list[list[int]]] = {0.0: stock}
    rows = []
    async with contextlib.AsyncExitStack() as stack:
        spans = even_cuts(read_shape(model).blocks, setup.nodes)
        nodes = [await stack.enter_async_context(network.node(setup, span, 1.0)) for span in spans]
        for case in cases:
            async with _client_of(setup, network, [node.address for node in nodes]) as client:
                client.use_drafter(load_drafter("none" if case.draft == PLAIN else case.draft, model))
                options = {"max_new_tokens": setup.tokens, "temperature": case.temperature, "tree_size": case.size}
                runs = [await client.generate(prompt, ignore_eos=True, seed=SEED, **options) for prompt in prompts]
            # Plain decoding comes first at each temperature: its sampled texts are what the others must repeat.
            texts = expected.setdefault(case.temperature, [run.token_ids for run in runs])
            rows.append({"cell": cell.name} | asdict(case) | _figures(runs, texts))
    return rows


@contextlib.asynccontextmanager
async def _client_of(setup: BenchSetup, network: VirtualNetwork, peers: Sequence[str]) -> AsyncIterator[BenchClient]:
    """Open a client that knows nothing of earlier cases."""
    transport = network.transport()
    options = {"prefix_scope": "none", "drive": "self", "transport": transport, "clock": network.loop.clock}
    try:
        async with BenchClient(model=setup.model, peers=",".join(peers), draft="none", **options) as client:
            yield client
    finally:
        await transport.close()


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
