"""`swarm demo` starts three nodes, and lets plain decoding and trees write the same text over slow links."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from treeswarm.extras import require
from treeswarm.model_files import read_shape, resolve_model
from treeswarm.programs.process import run_until_terminated
from treeswarm.tasks import cancelled
from treeswarm_client.cli.checks import check_at_least, check_prompt
from treeswarm_client.cli.flags import parse_tree_size
from treeswarm_client.cli.render.lanes import LaneDisplay
from treeswarm_client.cli.render.live import stdout_console
from treeswarm_client.cli.render.steps import show_step
from treeswarm_client.client import SwarmClient
from treeswarm_client.client_settings import largest_tree
from treeswarm_client.drafters import load_drafter
from treeswarm_client.generation.comparison import Comparison, compare_with_plain
from treeswarm_client.local_swarm import LocalNode, even_cuts, local_swarm
from treeswarm_client.provenance import chain_provenance, machine_provenance
from treeswarm_client.reference import stock_greedy

MODEL, DRAFT, DTYPE = "demo", "demo-draft", "float32"
NODES = 3
PROMPT = '''def copy(src, dst, *, follow_symlinks=True):
    """Copy data and mode bits'''
LINK = "delay=25ms"
STARTING = "starting three nodes, links emulated at 25 ms one way, and loading the draft model"
NEXT = (
    ("your own prompt", 'swarm demo --prompt "def read(self, size=-1):"'),
    ("a swarm to keep", "swarm-node demo"),
    ("  its join code", "CODE=swarm:…   # in a second terminal: what that node prints after `join code`"),
    ("  chat with it", "swarm chat --model demo --registry $CODE"),
    ("  see its map", "swarm serve --model demo --registry $CODE  # then open http://127.0.0.1:8000/map/"),
    (
        "a second machine",
        "install there in the same way, and run the line that the first node prints after `nodes join with`",
    ),
)
"""What to try after the demo, and the command for it."""
EXAMPLES = """examples:
  swarm demo
  swarm demo --prompt "def read(self, size=-1):" --max-new-tokens 48
  swarm demo --tree-size 16 --json | jq .tree.tokens_per_traversal"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm demo` to the command line."""
    parser = commands.add_parser(
        "demo",
        help="three nodes on this machine, live text, plain decoding against trees",
        description="Start three swarm-node processes on loopback with the bundled model, let plain decoding and "
        "trees write the same text in turns over links emulated at 25 ms one way, and compare both with a stock "
        "transformers model.",
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
    parser.add_argument("--json", action="store_true", help="print one JSON object: exact, plain, tree, ratio")
    parser.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> int:
    check_at_least("--max-new-tokens", args.max_new_tokens, 1)
    largest_tree(args.tree_size)
    check_prompt(argparse.Namespace(**vars(args), model=MODEL, revision=None), args.prompt)
    require("node", "swarm demo")
    return run_until_terminated(_run(args))


async def _run(args: argparse.Namespace) -> int:
    console = stdout_console()
    if args.json:
        console = Console(stderr=True, highlight=False)
        console.quiet = not console.is_terminal
    async with contextlib.AsyncExitStack() as stack:
        client = await _start(stack, console)
        comparison = await _compare(client, args, console)
        trees = comparison.trees.run
        async with show_step(console, "3/3 the same text from a stock transformers model, in a process of its own"):
            stock = await stock_greedy(resolve_model(MODEL), [trees.prompt_ids], args.max_new_tokens, DTYPE)
        exact = comparison.same_text and trees.token_ids == stock.token_ids[0]
        console.print(_table(comparison))
        console.print(_verdict(exact=exact))
        if args.json:
            print(json.dumps(await _as_json(client, comparison, exact=exact)))
        else:
            steps = next_steps(Path(sys.prefix), Path.cwd(), os.get_exec_path())
            console.print("", *steps, sep="\n", markup=False, soft_wrap=True)
    return 0 if exact else 1


async def _start(stack: contextlib.AsyncExitStack, console: Console) -> SwarmClient:
    """Start the nodes while the draft model loads, and return a client connected to them.

    The KV of prompts is not shared between generations: each text is measured as if it were the first.
    """
    model = resolve_model(MODEL)
    ready: list[LocalNode] = []
    async with show_step(console, f"1/3 {STARTING}") as rename:

        def on_ready(node: LocalNode) -> None:
            ready.append(node)
            rename(f"1/3 {STARTING}: {len(ready)} of {NODES} ready")

        drafting = asyncio.create_task(asyncio.to_thread(load_drafter, DRAFT, model))
        stack.push_async_callback(cancelled, drafting)
        nodes = await stack.enter_async_context(
            local_swarm(
                MODEL, even_cuts(read_shape(model).blocks, NODES), dtype=DTYPE, emulate_link=LINK,
                keeps_nothing=True, on_ready=on_ready,
            )
        )  # fmt: skip
        client = SwarmClient(MODEL, nodes.peers, drafter=await drafting, emulate_link=LINK, prefix_scope="none")
        await stack.enter_async_context(client)
    for node in nodes.nodes:
        console.print(f"[bold]swarm-node[/bold] {node.address}  blocks {node.ready['blocks']} of {node.ready['of']}")
    return client


async def _compare(client: SwarmClient, args: argparse.Namespace, console: Console) -> Comparison:
    """Let plain decoding and trees write in turns, and show both live; then show the text."""
    console.print(
        "2/3 plain decoding and trees write the same text in turns; each colour is one round trip\n", soft_wrap=True
    )
    display = LaneDisplay(console, args.prompt)
    with display.live():
        comparison = await compare_with_plain(
            client, args.prompt, max_new_tokens=args.max_new_tokens, tree_size=args.tree_size, on_token=display.on_token
        )
    display.print_text(comparison.trees)
    return comparison


def _table(comparison: Comparison) -> Table:
    table = Table(title="the same text over links of 25 ms one way", title_justify="left")
    for column in ("", "round trips", "tokens per round trip", "tokens/s", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, lane, ratio in (("plain decoding", comparison.plain, 1.0), ("trees", comparison.trees, comparison.ratio)):
        stats = lane.stats
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


def next_steps(environment: Path, folder: Path, path: Sequence[str]) -> list[str]:
    """Return what to try next, as commands that work in this folder.

    `environment` is the folder of the Python environment that runs, `path` the folders in which commands are found.
    """
    lines = [f"Next, in {folder}:"]
    if str(environment / "bin") not in path:
        shown = environment.relative_to(folder) if environment.is_relative_to(folder) else environment
        lines.append(f"  {'once per terminal':<17} . {shown}/bin/activate")
    return lines + [f"  {what:<17} {command}" for what, command in NEXT]


async def _as_json(client: SwarmClient, comparison: Comparison, *, exact: bool) -> dict[str, Any]:
    provenance = machine_provenance() | {"model": MODEL, "draft": DRAFT, "quantization": "none", "link": LINK}
    return {
        "exact": exact,
        "text": comparison.trees.run.text,
        "plain": comparison.plain.stats.as_dict(),
        "tree": comparison.trees.stats.as_dict(),
        "ratio": comparison.ratio,
        "provenance": provenance | await chain_provenance(client),
    }
