"""`swarm generate`: continue a prompt."""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from treeswarm.errors import SwarmError
from treeswarm.keys import read_swarm_key
from treeswarm.messages import NumericsClass
from treeswarm_client.cli.live import LiveText, summary_line
from treeswarm_client.cli.route_text import route_as_dict, route_lines
from treeswarm_client.client import DEFAULT_PATIENCE_S, SwarmClient
from treeswarm_client.planner.explain import explain_lines
from treeswarm_client.run import Run, TreeSize

EXAMPLES = """examples:
  swarm generate "def main():" --model demo --peers 127.0.0.1:4001,127.0.0.1:4002 --draft demo-draft
  swarm generate "Once" --model ./Llama-3-8B --peers 10.0.0.5:4001,10.0.0.6:4001 --draft ./Llama-3.2-1B \\
        --temperature 0.7 --top-p 0.9 --seed 1 --max-new-tokens 300
  swarm generate "Twice" --model ./Llama-3-8B --peers 10.0.0.5:4001,10.0.0.6:4001 --draft ngram
  swarm generate "x =" --model demo --registry 203.0.113.7:4001 --show-route --patience 120
  swarm generate "x =" --model demo --peers 127.0.0.1:4001 --tree-size 0 --json | jq .stats"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    made = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with the target model's own text, token for token.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("prompt", metavar="PROMPT")
    made.add_argument(
        "--model", required=True, help="model directory, hub id or `demo`: its config and tokenizer are read"
    )
    add_route_flags(made)
    made.add_argument(
        "--draft",
        default="auto",
        metavar="WHO",
        help="who guesses: a draft model (directory, hub id or `demo-draft`), the same with `+ngram` behind it, ngram "
        "(no model, no torch), none, or auto: the draft model at hand with ngram, else ngram (default auto)",
    )
    made.add_argument("--draft-device", default="cpu", help="where the draft runs (default cpu)")
    made.add_argument(
        "--tree-size",
        type=tree_size,
        default="auto",
        metavar="N",
        help="drafted nodes a traversal; 0 is plain decoding; auto (default): what brings most tokens a second",
    )
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="only nodes that compute in it")
    made.add_argument("--quantization", choices=["none", "int8", "nf4"], help="only nodes with such weights")
    made.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    made.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    made.add_argument("--top-p", type=float, default=1.0, help="default 1.0: off")
    made.add_argument("--top-k", type=int, default=0, help="default 0: off")
    made.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    made.add_argument("--emulate-link", metavar="SHAPE", help="delay what this client sends: delay=25ms,rate=100mbit")
    made.add_argument(
        "--patience",
        type=float,
        default=DEFAULT_PATIENCE_S,
        metavar="SECONDS",
        help=f"wait so long for missing blocks to be served again (default {DEFAULT_PATIENCE_S:.0f})",
    )
    made.add_argument("--show-route", action="store_true", help="which nodes computed what, and what happened to them")
    made.add_argument("--explain", action="store_true", help="on stderr: each round's tree, why, and where time went")
    made.add_argument("--json", action="store_true", help="one JSON object instead of live text")
    made.set_defaults(run=lambda args: asyncio.run(_run(args)))


def tree_size(word: str) -> TreeSize:
    """`auto`, or a number of nodes."""
    if word == "auto":
        return "auto"
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"'{word}' is neither auto nor a number of nodes")
    return int(word)


def add_route_flags(made: argparse.ArgumentParser) -> None:
    """Where the nodes are."""
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("--peers", metavar="HOST:PORT,…", help="the nodes' addresses, each with its #PIN or without")
    where.add_argument(
        "--registry",
        metavar="SPEC",
        help="HOST:PORT,… of any nodes, which tell of all others; or mqtts://USER:PASSWORD@HOST/NAMESPACE; or "
        "static:HOST:PORT,… (the same as --peers)",
    )
    add_swarm_key_flag(made)


def add_swarm_key_flag(made: argparse.ArgumentParser) -> None:
    """Which private swarm."""
    made.add_argument("--swarm-key", type=Path, metavar="PATH", help="key file of a private swarm (default: open)")


async def _run(args: argparse.Namespace) -> int:
    client = SwarmClient(
        model=args.model,
        peers=args.peers,
        registry=args.registry,
        draft=args.draft,
        tree_size=args.tree_size,
        draft_device=args.draft_device,
        emulate_link=args.emulate_link,
        swarm_key=read_swarm_key(args.swarm_key) if args.swarm_key else None,
        patience=args.patience,
        dtype=args.dtype,
        quantization=args.quantization,
    )
    async with client:
        run = client.stream(
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            seed=args.seed,
        )
        try:
            if args.json:
                return await _as_json(run, client.target.numerics)
            return await _live(args.prompt, run, client.target.numerics, show_route=args.show_route)
        finally:
            if args.explain:
                print(*explain_lines(run.meter.reports), sep="\n", file=sys.stderr)


async def _live(prompt: str, run: Run, numerics: NumericsClass, *, show_route: bool) -> int:
    console = Console(highlight=False)
    live = LiveText(console)
    live.prompt(prompt)
    try:
        async for token in run:
            live.token(token)
    finally:
        live.end()
        if run.stats is not None and run.stats.traversals:
            console.print(summary_line(run.stats))
            if not numerics.plain:
                console.print(f"computed in {numerics}: not the text of the weights as published", style="dim")
        if show_route and run.chain is not None:
            for line in route_lines(run.chain):
                console.print(line)
    return 0


async def _as_json(run: Run, numerics: NumericsClass) -> int:
    """The object comes out whole even when the generation broke: with `error` and the text so far."""
    failure: SwarmError | None = None
    try:
        async for _ in run:
            pass
    except SwarmError as error:
        failure = error
    result: dict[str, Any] = {
        "text": run.text,
        "token_ids": run.token_ids,
        "stats": run.stats.as_dict() if run.stats else None,
        "rounds": [report.as_dict() for report in run.meter.reports],
        "numerics": asdict(numerics),
        "route": route_as_dict(run.chain) if run.chain else None,
    }
    if failure is not None:
        result["error"] = {"type": type(failure).__name__, "message": str(failure)}
        print(f"swarm: {failure}", file=sys.stderr)
    print(json.dumps(result))
    return 1 if failure else 0
