"""`swarm demo`: three nodes on this machine, a completion that streams, and what trees buy over slow links."""

import argparse
import contextlib
import io
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from treeswarm.model_files import resolve_model
from treeswarm_bench.benchmarks.common import Bench, BenchSetup, bench_swarm
from treeswarm_client.cli.flags import tree_size
from treeswarm_client.cli.render.live import LiveText
from treeswarm_client.cli.signals import run
from treeswarm_client.generation.run import Run, TreeSize
from treeswarm_client.generation.stats import Stats
from treeswarm_client.reference import stock_greedy

PROMPT = '''def copy(src, dst, *, follow_symlinks=True):
    """Copy data and mode bits'''
DELAY = "delay=25ms"
EXAMPLES = """examples:
  swarm demo
  swarm demo --prompt "import os" --max-new-tokens 48
  swarm demo --tree-size 16 --json | jq .tree.tokens_per_traversal"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    made = commands.add_parser(
        "demo",
        help="three nodes on this machine, live text, plain decoding against trees",
        description="Start three swarm-node processes on loopback with the bundled model, stream a completion over "
        "links emulated at 25 ms one way, and compare plain decoding, trees and a stock transformers model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--prompt", default=PROMPT)
    made.add_argument("--max-new-tokens", type=int, default=96, metavar="N", help="default 96")
    made.add_argument("--tree-size", type=tree_size, default="auto", metavar="N", help="default auto")
    made.add_argument("--json", action="store_true", help="one JSON object: exact, plain, tree")
    made.set_defaults(run=lambda args: run(_run(args)))


async def _run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, file=io.StringIO() if args.json else None)
    setup = BenchSetup(tokens=args.max_new_tokens)
    status = console.status("starting three nodes, links emulated at 25 ms one way …")
    async with contextlib.AsyncExitStack() as stack:
        with status:
            bench = await stack.enter_async_context(bench_swarm(setup, link=DELAY))
        _introduce(console, bench)
        tree = await _stream(bench, args.prompt, console, args.tree_size)
        with console.status("the same text once more, one token a traversal …"):
            plain = await bench.run(bench.client.encode(args.prompt), tree_size=0)
        with console.status("and by a stock transformers model in a process of its own …"):
            prompt = bench.client.encode(args.prompt)
            stock = await stock_greedy(resolve_model(setup.model), [prompt], setup.tokens, setup.dtype)
        exact = tree.token_ids == plain.token_ids == stock.token_ids[0]
        assert plain.stats is not None
        assert tree.stats is not None
        console.print(_table(plain.stats, tree.stats))
        console.print(_verdict(exact=exact))
        if args.json:
            print(json.dumps(await _as_json(bench, plain, tree, exact=exact)))
    return 0 if exact else 1


def _introduce(console: Console, bench: Bench) -> None:
    for node in bench.swarm.nodes:
        console.print(f"[bold]swarm-node[/bold] {node.address}  blocks {node.ready['blocks']} of {node.ready['of']}")
    console.print("each colour is one round trip through all three:\n", style="dim")


async def _stream(bench: Bench, prompt: str, console: Console, size: TreeSize) -> Run:
    live = LiveText(console)
    live.prompt(prompt)
    run = bench.client.stream(prompt, max_new_tokens=bench.setup.tokens, tree_size=size, ignore_eos=True)
    async for token in run:
        live.token(token)
    live.end()
    console.print()
    return run


def _table(plain: Stats, tree: Stats) -> Table:
    table = Table(title="the same text over links of 25 ms one way", title_justify="left")
    for column in ("", "traversals", "tokens a traversal", "tokens/s", "ratio"):
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
        return "[green]identical[/green]: plain, trees and stock transformers gave the same tokens"
    return "[red]not identical[/red]: run `swarm bench exact` to see where the texts part"


async def _as_json(bench: Bench, plain: Run, tree: Run, *, exact: bool) -> dict[str, Any]:
    assert plain.stats is not None
    assert tree.stats is not None
    return {
        "exact": exact,
        "text": tree.text,
        "plain": plain.stats.as_dict(),
        "tree": tree.stats.as_dict(),
        "provenance": await bench.provenance(),
    }
