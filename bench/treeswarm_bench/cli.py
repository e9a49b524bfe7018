"""`swarm bench`: repeat the figures of docs/benchmarks.md on this machine."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.pretty import pprint

from treeswarm.errors import BadRequest
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.widened_model import widened_model
from treeswarm_bench.lab.shape import LabLink
from treeswarm_client.cli.flags import add_swarm_key_flag, parse_tree_size
from treeswarm_client.cli.signals import run_until_terminated

EXAMPLES = """examples:
  swarm bench exact --json                   20 prompts, 1 to 3 nodes, five tree sizes, against stock transformers
  swarm bench trees --prompts 4 --json       tokens a traversal by tree size, beside three baselines
  swarm bench sampling --json                shared noise beside trees sampled from the draft; one process, ten minutes
  swarm bench wan --json > wan.json          nine ways to decode over five kinds of links; some 40 minutes
  swarm bench wan --cells 25ms --texts code --strategies plain,star,auto   a few minutes of the same
  swarm bench draw wan.json --out wan.svg    what came of it, as pictures
  swarm bench faults --json                  100 generations, each hit by a kill, a hang, a cut, a refusal or a drain
  swarm bench load --clients 64 --json       more clients than there is room for
  swarm bench batch --widen 16 --json        many clients on a model whose step is bound by its weights
  swarm bench offload --widen 16 --json      weights streamed from disk beside plain, by tree size
  swarm bench fuzz --messages 10000 --json   hostile messages at a real node: does it live, does it still serve?
  swarm bench tls --json                     what TLS costs on loopback, beside plaintext in the same run
  swarm bench wan --lab delay=25ms,rate=100mbit   plain against trees over real TCP, a namespace a node (root, Linux)
  swarm bench wan --peers A:4001,B:4001      the same with nodes that run already
  swarm bench exact --model DIR --draft DIR  the same on a model of your own"""

# With these the wan bench's whole matrix takes some 40 minutes on two idle cores.
PROMPTS = {"exact": 20, "sampling": 16, "wan": 3}
TOKENS = {"exact": 128, "faults": 96, "wan": 20}
# Of two or three blocks a node, streamed through two slots, most would stay in memory.
NODES = {"offload": 1}
DRAFTS = {"wan": "auto"}
ANYWHERE = ("overhead", "wan")
"""Benches that can do with nodes that are not their own."""
WIDENING = ("batch", "offload")
"""Benches of what is bound by weights."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    made = commands.add_parser(
        "bench",
        help="measure exactness and speed with real nodes on this machine",
        description="Start real swarm-node processes on loopback and measure.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("which", choices=sorted(_benches()))
    made.add_argument("file", nargs="?", type=Path, metavar="FILE.json", help="draw: what wan --json printed")
    made.add_argument(
        "--out", type=Path, metavar="FILE.svg", help="draw: where to, svg or png (needs the extra `plot`)"
    )
    made.add_argument("--model", default="demo", help="target: directory, hub id or demo (default)")
    made.add_argument("--draft", help="draft model (default demo-draft; wan: auto, as swarm generate's)")
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    made.add_argument(
        "--widen",
        type=int,
        default=1,
        metavar="N",
        help="batch, offload: the same text from N times the feed-forward's weights (default 1)",
    )
    made.add_argument("--quantization", choices=["int8", "nf4"], help="batch: weights of the nodes in so many bits")
    made.add_argument("--nodes", type=int, help="node processes (default 3; offload: 1)")
    made.add_argument(
        "--prompts", type=int, help="held-out prompts (default 8; exact: 20, sampling: 16, wan: 3 of each text)"
    )
    made.add_argument("--max-new-tokens", type=int, help="a prompt (default 64; exact: 128, faults: 96, wan: 20)")
    for name, what in (("cells", "1ms,25ms,50ms,100ms,slow-node"), ("texts", "code,prose,copying,zero")):
        made.add_argument(f"--{name}", type=_words, metavar="A,B", help=f"wan: some of {what} (default all)")
    made.add_argument("--strategies", type=_words, metavar="A,B", help="wan: such as plain,tree-64,auto (default all)")
    made.add_argument("--temperatures", type=_decimals, metavar="A,B", help="wan: default 0,1; sampling: 0.3,0.7,1")
    made.add_argument(
        "--tree-size", type=parse_tree_size, default=64, help="wan with --lab or --peers: auto, or (default) 64"
    )
    made.add_argument("--sizes", type=_numbers, help="tree sizes of exact, trees and sampling, such as 8,64")
    made.add_argument("--generations", type=int, default=100, help="of the faults bench (default 100)")
    made.add_argument("--seed", type=int, default=0, help="of the faults bench's schedule (default 0)")
    made.add_argument("--clients", type=int, default=64, help="of the load bench (default 64)")
    made.add_argument("--messages", type=int, default=10_000, help="of the fuzz bench (default 10000)")
    add_swarm_key_flag(made)
    made.add_argument("--prompt-tokens", type=int, help="wan with --lab or --peers: cut prompts to so many (all 128)")
    where = made.add_mutually_exclusive_group()
    where.add_argument("--peers", help="overhead, wan: nodes that run already, HOST:PORT,HOST:PORT")
    where.add_argument("--lab", metavar="LINK", help="overhead, wan: a namespace a node; delay=25ms,rate=100mbit")
    made.add_argument("--congestion", help="TCP congestion control in the lab: cubic, reno, bbr (default: system's)")
    made.add_argument("--json", action="store_true", help="one JSON object")
    made.set_defaults(run=_run)


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _decimals(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _run(args: argparse.Namespace) -> int:
    # Between nodes that run elsewhere `wan` is another bench, on eight prompts of 64 tokens.
    where = "elsewhere" if args.peers or args.lab else args.which
    if (args.peers or args.lab) and args.which not in ANYWHERE:
        raise BadRequest(f"--peers and --lab are for {' and '.join(ANYWHERE)}: {args.which} starts its own")
    if args.widen != 1 and args.which not in WIDENING:
        raise BadRequest(f"--widen is for {' and '.join(WIDENING)}, whose figures depend on how much a step reads")
    if args.quantization and args.which != "batch":
        raise BadRequest(f"--quantization is for batch: {args.which} measures weights as they are")
    if args.congestion and not args.lab:
        raise BadRequest("--congestion is for --lab: elsewhere the hosts' own settings count")
    setup = BenchSetup(
        model=args.model,
        draft=args.draft or DRAFTS.get(where, BenchSetup.draft),
        dtype=args.dtype,
        nodes=args.nodes or NODES.get(args.which, BenchSetup.nodes),
        prompts=args.prompts or PROMPTS.get(where, BenchSetup.prompts),
        swarm_key=args.swarm_key,
        tokens=args.max_new_tokens or TOKENS.get(where, BenchSetup.tokens),
        prompt_tokens=args.prompt_tokens,
        peers=args.peers,
        quantization=args.quantization,
    )
    bench = _in_lab if args.lab else _benches()[args.which]

    async def widened() -> dict[str, Any]:
        # Within: told to end meanwhile, it removes what it wrote.
        with _widened(setup, args.widen) as wide:
            return await bench(wide, args)

    result = run_until_terminated(widened())
    if args.json:
        print(json.dumps(result))
    elif args.which == "tls":
        from treeswarm_bench.benchmarks import tls  # noqa: PLC0415

        Console().print(tls.table(result))
    else:
        pprint(result, console=Console(), expand_all=True)
    return 1 if result.get("mismatches") or not result.get("well", True) else 0


@contextlib.contextmanager
def _widened(setup: BenchSetup, times: int) -> Iterator[BenchSetup]:
    """The same for a wider model, which exists meanwhile."""
    if times == 1:
        yield setup
        return
    with widened_model(setup.model, times) as wide:
        mib = wide.file_bytes / 2**20
        print(f"{setup.model} with {times} times the neurons: {mib:.0f} MiB in {wide.folder}", file=sys.stderr)
        yield replace(setup, model=str(wide.folder), widened=wide)


def _benches() -> dict[str, Callable[[BenchSetup, argparse.Namespace], Coroutine[None, None, dict[str, Any]]]]:
    return {
        "exact": _exact,
        "trees": _trees,
        "sampling": _sampling,
        "overhead": _overhead,
        "wan": _wan,
        "batch": _batch,
        "flips": _flips,
        "fuzz": _fuzz,
        "tls": _tls,
        "faults": _faults,
        "load": _load,
        "draw": _draw,
        "offload": _offload,
    }


async def _exact(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import exact  # noqa: PLC0415  # benches load only what they use

    return await exact.bench_exact(setup, sizes=args.sizes or exact.SIZES)


async def _trees(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import trees  # noqa: PLC0415  # brings torch

    return await trees.bench_trees(setup, sizes=args.sizes or trees.SIZES)


async def _sampling(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import sampling  # noqa: PLC0415  # brings torch

    temperatures = args.temperatures or sampling.TEMPERATURES
    return await sampling.bench_sampling(setup, sizes=args.sizes or sampling.SIZES, temperatures=temperatures)


async def _overhead(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import overhead  # noqa: PLC0415

    return await overhead.bench_overhead(setup)


async def _wan(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import wan_live as wan  # noqa: PLC0415
    from treeswarm_bench.benchmarks import wan_matrix as internet  # noqa: PLC0415

    if setup.peers:
        return await wan.bench_peers(setup, tree_size=args.tree_size)
    plan = internet.MatrixPlan.of(args.cells, args.texts, args.temperatures, args.strategies)
    return await internet.bench_internet(setup, plan, say=internet.to_stderr)


async def _draw(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import draw  # noqa: PLC0415  # brings matplotlib

    if args.file is None or args.out is None:
        raise BadRequest("say what to draw and where: swarm bench draw FILE.json --out FILE.svg")
    return {"bench": "draw", "wrote": [str(path) for path in draw.draw(args.file, args.out)]}


async def _in_lab(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import wan_live as wan  # noqa: PLC0415

    link = LabLink.parse(args.lab)
    return await wan.bench_in_lab(args.which, setup, link=link, congestion=args.congestion, tree_size=args.tree_size)


async def _faults(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import faults  # noqa: PLC0415

    return await faults.bench_faults(setup, generations=args.generations, seed=args.seed)


async def _load(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import load  # noqa: PLC0415

    return await load.bench_load(setup, clients=args.clients)


async def _offload(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import offload  # noqa: PLC0415

    return await offload.bench_offload(setup, sizes=args.sizes or offload.SIZES)


async def _batch(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import batching as links  # noqa: PLC0415

    return await links.bench_batch(setup)


async def _flips(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import bf16_flips as flips  # noqa: PLC0415

    return await flips.bench_flips(setup)


async def _fuzz(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import fuzz  # noqa: PLC0415

    return await fuzz.bench_fuzz(setup, messages=args.messages)


async def _tls(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import tls  # noqa: PLC0415

    return await tls.bench_tls()
