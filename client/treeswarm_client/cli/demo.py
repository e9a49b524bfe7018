"""`swarm demo` starts three nodes, streams a completion and shows how much faster trees are over slow links."""

import argparse
import contextlib
import io
import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from treeswarm.model_files import read_shape, resolve_model
from treeswarm_client.cli.flags import parse_tree_size
from treeswarm_client.cli.render.live import LiveText
from treeswarm_client.cli.signals import run_until_terminated
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run, TreeSize
from treeswarm_client.generation.stats import Stats
from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm
from treeswarm_client.provenance import chain_provenance, machine_provenance
from treeswarm_client.reference import stock_greedy

MODEL, DRAFT, DTYPE = "demo", "demo-draft", "float32"
NODES = 3
PROMPT = '''def copy(src, dst, *, follow_symlinks=True):
    """Copy data and mode bits'''
LINK = "delay=25ms"
EXAMPLES = """examples:
  swarm demo
  swarm demo --prompt "import os" --max-new-tokens 48
  swarm demo --tree-size 16 --json | jq .tree.tokens_per_traversal"""


@dataclass(frozen=True)
class DemoSwarm:
    """The nodes of the demo and a client connected to them."""

    nodes: LocalSwarm
    client: SwarmClient


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm demo` to the command line."""
    parser = commands.add_parser(
        "demo",
        help="three nodes on this machine, live text, plain decoding against trees",
        description="Start three swarm-node processes on loopback with the bundled model, stream a completion over "
        "links emulated at 25 ms one way, and compare plain decoding, trees and a stock transformers model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompt", default=PROMPT, help="text to continue (default: the beginning of a function)")
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="N", help="tokens to generate (default 96)")
    parser.add_argument(
        "--tree-size",
        type=parse_tree_size,
        default="auto",
        metavar="N",
        help="draft nodes per round, or auto (default)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: exact, plain, tree")
    parser.set_defaults(run=lambda args: run_until_terminated(_run(args)))


async def _run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, file=io.StringIO() if args.json else None)
    tokens = args.max_new_tokens
    async with contextlib.AsyncExitStack() as stack:
        with console.status("starting three nodes, links emulated at 25 ms one way …"):
            swarm = await _start(stack)
        _print_nodes(console, swarm)
        prompt = swarm.client.encode(args.prompt)
        tree = await _stream(swarm.client, args.prompt, console, tokens, args.tree_size)
        with console.status("the same text again, one token per traversal …"):
            plain = await swarm.client.generate(prompt, max_new_tokens=tokens, tree_size=0, ignore_eos=True)
        with console.status("the same text from a stock transformers model in a process of its own …"):
            stock = await stock_greedy(resolve_model(MODEL), [prompt], tokens, DTYPE)
        exact = tree.token_ids == plain.token_ids == stock.token_ids[0]
        console.print(_table(_stats(plain), _stats(tree)))
        console.print(_verdict(exact=exact))
        if args.json:
            print(json.dumps(await _as_json(swarm.client, plain, tree, exact=exact)))
    return 0 if exact else 1


async def _start(stack: contextlib.AsyncExitStack) -> DemoSwarm:
    """Start the nodes and connect a client.

    The KV of prompts is not shared between generations: each text is measured as if it were the first.
    """
    spans = even_cuts(read_shape(resolve_model(MODEL)).blocks, NODES)
    nodes = await stack.enter_async_context(local_swarm(MODEL, spans, dtype=DTYPE, emulate_link=LINK))
    client = SwarmClient(model=MODEL, peers=nodes.peers, draft=DRAFT, emulate_link=LINK, prefix_scope="none")
    return DemoSwarm(nodes, await stack.enter_async_context(client))


def _print_nodes(console: Console, swarm: DemoSwarm) -> None:
    for node in swarm.nodes.nodes:
        console.print(f"[bold]swarm-node[/bold] {node.address}  blocks {node.ready['blocks']} of {node.ready['of']}")
    console.print("each colour is one round trip through all three:\n", style="dim")


async def _stream(client: SwarmClient, prompt: str, console: Console, tokens: int, size: TreeSize) -> Run:
    live = LiveText(console)
    live.prompt(prompt)
    run = client.stream(prompt, max_new_tokens=tokens, tree_size=size, ignore_eos=True)
    async for token in run:
        live.token(token)
    live.end()
    console.print()
    return run


def _stats(run: Run) -> Stats:
    assert run.stats is not None  # they are set when a run ends
    return run.stats


def _table(plain: Stats, tree: Stats) -> Table:
    table = Table(title="the same text over links of 25 ms one way", title_justify="left")
    for column in ("", "traversals", "tokens per traversal", "tokens/s", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, stats in (("plain decoding", plain), ("speculation trees", tree)):
        ratio = stats.tokens_per_second / plain.tokens_per_second
        table.add_row(
            name,
            str(stats.traversals),
            f"{stats.tokens_per_traversal:.2f}",
            f"{stats.tokens_per_second:.1f}",
            f"{ratio:.1f}×",
        )
    return table


def _verdict(*, exact: bool) -> str:
    if exact:
        return "[green]identical[/green]: plain decoding, trees and stock transformers gave the same tokens"
    return "[red]not identical[/red]: run `swarm bench exact` to see where the texts differ"


async def _as_json(client: SwarmClient, plain: Run, tree: Run, *, exact: bool) -> dict[str, Any]:
    provenance = machine_provenance() | {"model": MODEL, "draft": DRAFT, "quantization": "none", "link": LINK}
    return {
        "exact": exact,
        "text": tree.text,
        "plain": _stats(plain).as_dict(),
        "tree": _stats(tree).as_dict(),
        "provenance": provenance | await chain_provenance(client),
    }
