"""`swarm demo` starts three nodes, and lets plain decoding and trees write the same text over slow links."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from treeswarm.errors import BadRequest
from treeswarm.extras import require
from treeswarm.model_files import read_shape
from treeswarm.programs.process import run_until_terminated
from treeswarm.tasks import cancelled
from treeswarm_client.cli.checks import check_at_least
from treeswarm_client.cli.demo_texts import CHAT_MODEL, DemoSetup, choose_setup, next_steps
from treeswarm_client.cli.flags import parse_tree_size
from treeswarm_client.cli.render.download import show_download
from treeswarm_client.cli.render.lanes import LaneDisplay
from treeswarm_client.cli.render.live import stdout_console
from treeswarm_client.cli.render.steps import show_step
from treeswarm_client.client import SwarmClient
from treeswarm_client.client_settings import largest_tree
from treeswarm_client.drafters import choose_drafter
from treeswarm_client.drafters.selection.automatic import DraftChoice, follow_tail
from treeswarm_client.generation.comparison import Comparison, compare_with_plain
from treeswarm_client.local_swarm import LocalNode, even_cuts, local_swarm
from treeswarm_client.prompt_encoder import check_request, load_prompt_encoder
from treeswarm_client.provenance import chain_provenance, machine_provenance
from treeswarm_client.reference import stock_greedy

DTYPE = "float32"
NODES = 3
LINK = "delay=25ms"
STARTING = "starting three nodes, links emulated at 25 ms one way, and loading the drafter"
EXAMPLES = """examples:
  swarm demo
  swarm demo --prompt "Why is the sky blue?"
  swarm demo --model bundled --prompt "def read(self, size=-1):" --max-new-tokens 48
  swarm demo --tree-size 16 --json | jq .tree.tokens_per_traversal"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm demo` to the command line."""
    parser = commands.add_parser(
        "demo",
        help="three nodes on this machine, live text, plain decoding against trees",
        description="Start three swarm-node processes on loopback with SmolLM2, a chat model of 135 million parameters "
        "that is fetched once (98 MB), let plain decoding and trees write the same answer in turns over links emulated "
        "at 25 ms one way, and compare both with a stock transformers model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompt", help="your question (with --model bundled: text to continue)")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="another chat model, or bundled: two small models for Python code that come with this package (default: "
        "smollm2, or bundled if that cannot be fetched)",
    )
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
    if args.prompt == "":
        raise BadRequest("the prompt is empty: give a question, or leave --prompt out")
    require("node", "swarm demo")
    with show_download(args.model or CHAT_MODEL) as progress:
        setup, problem = choose_setup(args.model, args.prompt, progress)
    if problem is not None:
        print(f"{problem}; showing the bundled model for Python code instead", file=sys.stderr)
    encoder, shape = load_prompt_encoder(setup.model, setup.folder), read_shape(setup.folder)
    prompt_ids = setup.encode(encoder)
    check_request(prompt_ids, args.max_new_tokens, shape.vocab_size, shape.max_positions)
    return run_until_terminated(_run(args, setup, prompt_ids))


async def _run(args: argparse.Namespace, setup: DemoSetup, prompt_ids: list[int]) -> int:
    console = stdout_console()
    if args.json:
        console = Console(stderr=True, highlight=False)
        console.quiet = not console.is_terminal
    async with contextlib.AsyncExitStack() as stack:
        client, choice = await _start(stack, setup, console)
        console.print(f"{choice}", style="dim", soft_wrap=True)
        comparison = await _compare(client, args, setup, prompt_ids, console)
        trees = comparison.trees.run
        async with show_step(console, "3/3 the same text from a stock transformers model, in a process of its own"):
            stock = await stock_greedy(setup.folder, [prompt_ids], len(trees.token_ids), DTYPE)
        exact = comparison.same_text and trees.token_ids == stock.token_ids[0]
        console.print(_table(comparison))
        console.print(_verdict(exact=exact))
        if args.json:
            print(json.dumps(await _as_json(client, setup, comparison, exact=exact)))
        else:
            steps = next_steps(setup, Path(sys.prefix), Path.cwd(), os.get_exec_path())
            console.print("", *steps, sep="\n", markup=False, soft_wrap=True)
    return 0 if exact else 1


async def _start(
    stack: contextlib.AsyncExitStack, setup: DemoSetup, console: Console
) -> tuple[SwarmClient, DraftChoice]:
    """Start the nodes while the drafter loads, and return a client connected to them and which drafter it has.

    The KV of prompts is not shared between generations: each text is measured as if it were the first.
    """
    ready: list[LocalNode] = []
    async with show_step(console, f"1/3 {STARTING}") as rename:

        def on_ready(node: LocalNode) -> None:
            ready.append(node)
            rename(f"1/3 {STARTING}: {len(ready)} of {NODES} ready")

        drafting = asyncio.create_task(asyncio.to_thread(choose_drafter, setup.draft, setup.folder, setup.model))
        stack.push_async_callback(cancelled, drafting)
        nodes = await stack.enter_async_context(
            local_swarm(
                setup.model, even_cuts(read_shape(setup.folder).blocks, NODES), dtype=DTYPE, emulate_link=LINK,
                keeps_nothing=True, on_ready=on_ready,
            )
        )  # fmt: skip
        drafter, choice = await drafting
        client = SwarmClient(setup.model, nodes.peers, drafter=drafter, emulate_link=LINK, prefix_scope="none")
        await stack.enter_async_context(client)
    for node in nodes.nodes:
        console.print(f"[bold]swarm-node[/bold] {node.address}  blocks {node.ready['blocks']} of {node.ready['of']}")
    return client, follow_tail(choice, client.tail_offer)


async def _compare(
    client: SwarmClient, args: argparse.Namespace, setup: DemoSetup, prompt_ids: list[int], console: Console
) -> Comparison:
    """Let plain decoding and trees write in turns, and show both live; then show the text."""
    console.print(
        "2/3 plain decoding and trees write the same text in turns; each colour is one round trip\n", soft_wrap=True
    )
    display = LaneDisplay(console, f"{setup.prompt}\n\n" if setup.chats else setup.prompt)
    with display.live():
        comparison = await compare_with_plain(
            client,
            prompt_ids,
            max_new_tokens=args.max_new_tokens,
            tree_size=args.tree_size,
            ignore_eos=not setup.chats,
            on_token=display.on_token,
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


async def _as_json(client: SwarmClient, setup: DemoSetup, comparison: Comparison, *, exact: bool) -> dict[str, Any]:
    provenance = machine_provenance() | {
        "model": setup.model,
        "draft": setup.draft,
        "quantization": "none",
        "link": LINK,
    }
    return {
        "exact": exact,
        "text": comparison.trees.run.text,
        "plain": comparison.plain.stats.as_dict(),
        "tree": comparison.trees.stats.as_dict(),
        "ratio": comparison.ratio,
        "provenance": provenance | await chain_provenance(client),
    }
