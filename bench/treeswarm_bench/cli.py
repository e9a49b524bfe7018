"""`swarm bench`: repeat the figures of docs/benchmarks.md on this machine."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.pretty import pprint

from treeswarm.errors import BadRequest
from treeswarm.extras import require
from treeswarm.keys import read_swarm_key
from treeswarm.model_files import check_model_name
from treeswarm.programs.interrupts import interrupt_ends_process
from treeswarm.programs.process import run_until_terminated
from treeswarm.programs.units import format_bytes
from treeswarm.registry import parse_addresses
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.widened_model import widened_model
from treeswarm_bench.lab.shape import LabLink
from treeswarm_client.cli.checks import check_at_least
from treeswarm_client.cli.flags import add_swarm_key_flag, parse_tree_size

EXAMPLES = """examples:
  swarm bench exact --json                   20 prompts, 1 to 3 nodes, five tree sizes, against stock transformers
  swarm bench trees --prompts 4 --json       tokens per traversal by tree size, beside three baselines
  swarm bench proposals --speculator DIR --json   what the tail proposes beside other drafters; virtual clock
  swarm bench sampling --json                shared noise beside trees sampled from the draft; one process, ten minutes
  swarm bench wan --json > wan.json          nine ways to decode over five kinds of links; some 40 minutes
  swarm bench wan --cells 25ms --texts code --strategies plain,star,auto   a part of the same in a few minutes
  swarm bench draw wan.json --out wan.svg    the figures of wan --json as pictures
  swarm bench virtual-wan --json             wan on a virtual clock, as if every node had a machine of its own
  swarm bench virtual-wan --swift 10 --cells 25ms --texts code --json   the same with nodes 10 times as fast
  swarm bench driver --json                  the loop at a far user, on a node, and where auto puts it; virtual clock
  swarm bench busy --runs 20 --json          swarm demo again and again, beside eight busy loops
  swarm bench busy --load bursts --seed 1 --json   beside programs that import torch, start and end at random
  swarm bench disturbed --json               the planner when machines and links change their speed; virtual clock
  swarm bench disturbed --cells 25ms --cases "first draft 50x;noise" --texts good   a part of the same
  swarm bench overhead --json                what a hop costs besides the model and the wire
  swarm bench node --profile --json          what an append costs a node besides the model, in one process
  swarm bench planner --json                 how much of a round the planner takes, on simulated links
  swarm bench attention --device cuda --json   the torch reference beside the flash kernels
  swarm bench faults --json                  100 generations, each hit by a kill, a hang, a cut, a refusal or a drain
  swarm bench heal --kills 20 --registry-kind mqtt   how soon a spare node takes over the blocks of a killed one
  swarm bench load --clients 64 --json       more clients than there is room for
  swarm bench batch --widen 16 --json        many clients on a model whose forward is bound by reading its weights
  swarm bench offload --widen 16 --json      weights streamed from disk beside weights in memory, by tree size
  swarm bench flips --json                   how often bfloat16 text changes with the shape of a batch
  swarm bench fuzz --messages 10000 --json   hostile messages to real nodes, which must survive and still serve
  swarm bench tls --json                     what TLS costs on loopback, beside plaintext in the same run
  swarm bench ports --json                   what a borrowed port costs, beside a direct connection
  swarm bench ports --lab delay=25ms --beside   the same in a lab, the client on the lender's host (root, Linux)
  swarm bench registry --json                what the DHT, mosquitto (plain and TLS) and amqtt cost; needs both brokers
  swarm bench wan --lab delay=25ms,rate=100mbit   plain against trees over real TCP, a namespace per node (root, Linux)
  swarm bench wan --peers A:4001,B:4001      the same with nodes that run already
  swarm bench exact --model smollm2 --draft ngram --texts chat   the same on a chat model, with questions"""

# With these, the whole matrix of wan takes some 40 minutes on two idle cores.
PROMPTS = {"driver": 3, "exact": 20, "sampling": 16, "wan": 3, "virtual-wan": 4, "disturbed": 2}
TOKENS = {"driver": 48, "exact": 128, "faults": 96, "wan": 20, "virtual-wan": 32}
# A node of two or three blocks, streamed through two slots, would keep most of them in memory.
NODES = {"offload": 1}
DRAFTS = {"driver": "auto", "wan": "auto", "virtual-wan": "auto"}
PEERS_BENCHES = ("overhead", "wan")
"""Benches that can measure nodes that they did not start."""
LAB_BENCHES = (*PEERS_BENCHES, "ports")
WIDENED_BENCHES = ("batch", "offload")
"""Benches of what is bound by reading weights."""

RunBench = Callable[[BenchSetup, argparse.Namespace], Coroutine[None, None, dict[str, Any]]]


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command `bench`."""
    parser = commands.add_parser(
        "bench",
        help="measure exactness and speed with real nodes on this machine",
        description="Start real swarm-node processes on loopback and measure.\n"
        "The help of a flag that only some benches use begins with their names.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("which", choices=sorted(_benches()), metavar="BENCH", help=", ".join(sorted(_benches())))
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.json", help="draw: output of wan --json")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.svg", help="draw: file to write, .svg or .png (needs the extra `plot`)"
    )
    _add_model_flags(parser)
    _add_matrix_flags(parser)
    _add_flags_of_single_benches(parser)
    add_swarm_key_flag(parser)
    _add_place_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="target: directory, hub id or demo (default)")
    parser.add_argument("--draft", help="draft model (default demo-draft; wan and virtual-wan: auto)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default float32"
    )
    parser.add_argument(
        "--widen",
        type=int,
        default=1,
        metavar="N",
        help="batch, offload: multiply the weights of the feed-forwards, with the same text (default 1)",
    )
    parser.add_argument(
        "--quantization",
        choices=["int8", "int4", "nf4"],
        help="batch: format of the nodes' weights (default: as they are)",
    )
    parser.add_argument("--speculator", default="auto", help="proposals: folder that swarm train-speculator wrote")
    parser.add_argument("--nodes", type=int, metavar="N", help="number of node processes (default 3; offload: 1)")
    parser.add_argument(
        "--prompts",
        type=int,
        metavar="N",
        help="number of held-out prompts (default 8; exact: 20, sampling: 16; of each text, wan: 3, virtual-wan: 4; "
        "texts per case, disturbed: 2)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens per prompt (default 64; exact: 128, faults: 96, wan: 20, virtual-wan: 32)",
    )


def _add_matrix_flags(parser: argparse.ArgumentParser) -> None:
    for name, choices, more in (
        ("cells", "1ms,25ms,50ms,100ms,slow-node", ""),
        ("texts", "code,prose,copying,zero", "; chat asks a chat model questions, in exact and proposals too"),
    ):
        parser.add_argument(
            f"--{name}", type=_words, metavar="A,B", help=f"wan, virtual-wan: some of {choices} (default all){more}"
        )
    parser.add_argument(
        "--cases",
        type=lambda text: text.split(";"),
        metavar="A;B",
        help="disturbed: some of its faults, such as 'noise;cold nodes 5x' (default all); it takes --cells of 1ms, "
        "25ms, 100ms and --texts of good, poor, changing",
    )
    parser.add_argument(
        "--strategies", type=_words, metavar="A,B", help="wan, virtual-wan: such as plain,tree-64,auto (default all)"
    )
    parser.add_argument(
        "--temperatures",
        type=_decimals,
        metavar="A,B",
        help="wan, virtual-wan, proposals: default 0,1; sampling: default 0.3,0.7,1",
    )
    parser.add_argument(
        "--swift",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="virtual-wan: nodes so many times as fast as this machine (default 1)",
    )
    parser.add_argument(
        "--tree-size",
        type=parse_tree_size,
        default=64,
        metavar="N",
        help="wan with --lab or --peers: number of nodes per tree, or auto (default 64)",
    )
    parser.add_argument(
        "--sizes",
        type=_numbers,
        metavar="N,M",
        help="exact, trees, proposals, sampling, offload: tree sizes, such as 8,64",
    )


def _add_flags_of_single_benches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--generations", type=int, default=100, metavar="N", help="faults: number of generations (default 100)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="busy, faults, heal, disturbed: first seed (default 0)"
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="heal: number of kills (default 20)")
    parser.add_argument(
        "--registry-kind", choices=["dht", "mqtt"], default="dht", help="heal: registry of the nodes (default dht)"
    )
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="busy: number of demos (default 20)")
    parser.add_argument("--load", choices=["loops", "bursts"], default="loops", help="busy: what runs beside them")
    parser.add_argument(
        "--programs", type=int, default=8, metavar="N", help="busy: number of loops, or of bursts at a time (default 8)"
    )
    parser.add_argument("--clients", type=int, default=64, metavar="N", help="load: number of clients (default 64)")
    parser.add_argument(
        "--messages", type=int, default=10_000, metavar="N", help="fuzz: number of hostile messages (default 10000)"
    )
    parser.add_argument("--rounds", type=int, default=300, metavar="N", help="node: number of appends (default 300)")
    parser.add_argument(
        "--profile", action="store_true", help="node: print where the event loop spends its time, to standard error"
    )
    parser.add_argument("--device", default="cpu", help="attention: cpu, cuda, … (default cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="attention: threads on a CPU (default 1)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="attention: seconds per case, of 16 (default 2)"
    )


def _add_place_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="wan with --lab or --peers: cut prompts to N tokens (default 128)",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--peers", help="overhead, wan: nodes that run already, HOST:PORT,HOST:PORT")
    place.add_argument(
        "--lab",
        metavar="LINK",
        help="overhead, wan, ports: a network namespace per node, such as delay=25ms,rate=100mbit (root, Linux)",
    )
    parser.add_argument(
        "--congestion",
        help="overhead and wan with --lab: TCP's cubic, reno or bbr (default: the system's choice)",
    )
    parser.add_argument(
        "--beside", action="store_true", help="ports with --lab: the client is on the host that lends the port"
    )


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _decimals(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _run(args: argparse.Namespace) -> int:
    with interrupt_ends_process():
        _check_flags(args)
    # With nodes that run elsewhere, `wan` is another bench, on eight prompts of 64 tokens.
    defaults_of = "elsewhere" if args.peers or args.lab else args.which
    setup = BenchSetup(
        model=args.model,
        draft=args.draft or DRAFTS.get(defaults_of, BenchSetup.draft),
        dtype=args.dtype,
        nodes=args.nodes or NODES.get(args.which, BenchSetup.nodes),
        prompts=args.prompts or PROMPTS.get(defaults_of, BenchSetup.prompts),
        swarm_key=args.swarm_key,
        tokens=args.max_new_tokens or TOKENS.get(defaults_of, BenchSetup.tokens),
        prompt_tokens=args.prompt_tokens,
        peers=args.peers,
        quantization=args.quantization,
        speculator=args.speculator,
    )
    bench = _in_lab if args.lab and args.which in PEERS_BENCHES else _benches()[args.which]

    async def run_widened() -> dict[str, Any]:
        # The model is widened within the coroutine: when it is cancelled, it removes what it wrote.
        with _widened(setup, args.widen) as wide:
            return await bench(wide, args)

    result = run_until_terminated(run_widened())
    if args.json:
        print(json.dumps(result))
    elif args.which == "tls":
        from treeswarm_bench.benchmarks.parts import tls  # noqa: PLC0415

        Console().print(tls.table_of(result))
    elif args.which == "disturbed":
        from treeswarm_bench.benchmarks.disturbed import bench as disturbed  # noqa: PLC0415

        Console().print(disturbed.table_of(result))
    else:
        pprint(result, console=Console(), expand_all=True)
    return 1 if result.get("mismatches") or not result.get("well", True) else 0


def _check_flags(args: argparse.Namespace) -> None:
    """Raises BadRequest for a flag that does not fit the bench."""
    for flag in ("widen", "nodes", "prompts", "max_new_tokens", "generations", "clients", "messages", "rounds"):
        check_at_least(f"--{flag.replace('_', '-')}", getattr(args, flag), 1)
    check_model_name(args.model)
    if args.swarm_key:
        read_swarm_key(args.swarm_key)
    if args.lab:
        LabLink.parse(args.lab)
    if args.peers:
        parse_addresses(args.peers)
    if args.which != "draw":
        require("node", "swarm bench")
    if args.peers and args.which not in PEERS_BENCHES:
        raise BadRequest(f"--peers is for {' and '.join(PEERS_BENCHES)}: {args.which} starts its own nodes")
    if args.lab and args.which not in LAB_BENCHES:
        raise BadRequest(f"--lab is for {', '.join(LAB_BENCHES)}: {args.which} runs on loopback")
    if args.widen != 1 and args.which not in WIDENED_BENCHES:
        raise BadRequest(f"--widen is for {' and '.join(WIDENED_BENCHES)}, which are bound by reading weights")
    if args.quantization and args.which != "batch":
        raise BadRequest(f"--quantization is for batch: {args.which} measures weights as they are")
    if args.congestion and not (args.lab and args.which in PEERS_BENCHES):
        raise BadRequest("--congestion is for overhead and wan with --lab: elsewhere the hosts' own settings count")
    if args.beside and not (args.lab and args.which == "ports"):
        raise BadRequest("--beside is for ports with --lab: on loopback all processes share one host")


@contextlib.contextmanager
def _widened(setup: BenchSetup, times: int) -> Iterator[BenchSetup]:
    """Yield the same setup for a wider model, which exists until this context ends."""
    if times == 1:
        yield setup
        return
    with widened_model(setup.model, times) as wide:
        size = format_bytes(wide.file_bytes)
        print(f"{setup.model} with {times} times the neurons: {size} in {wide.folder}", file=sys.stderr)
        yield replace(setup, model=str(wide.folder), widened=wide)


def _benches() -> dict[str, RunBench]:
    return {
        "attention": _attention,
        "batch": _batch,
        "busy": _busy,
        "disturbed": _disturbed,
        "draw": _draw,
        "driver": _driver,
        "exact": _exact,
        "faults": _faults,
        "flips": _flips,
        "fuzz": _fuzz,
        "heal": _heal,
        "load": _load,
        "node": _node,
        "offload": _offload,
        "overhead": _overhead,
        "planner": partial(_alone, "parts.planner_time", "bench_planner"),
        "ports": _ports,
        "proposals": _proposals,
        "registry": partial(_alone, "parts.registry", "bench_registry"),
        "sampling": _sampling,
        "tls": partial(_alone, "parts.tls", "bench_tls"),
        "trees": _trees,
        "virtual-wan": _virtual_wan,
        "wan": _wan,
    }


# Each bench is imported when it runs, so that it loads only what it uses: many of them bring torch or matplotlib.


async def _alone(module: str, bench: str, setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    """Run a bench that takes neither setup nor flags."""
    imported = import_module(f"treeswarm_bench.benchmarks.{module}")
    result: dict[str, Any] = await getattr(imported, bench)()
    return result


async def _attention(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.parts import attention  # noqa: PLC0415

    return await attention.bench_attention(device=args.device, threads=args.threads, seconds=args.seconds)


async def _batch(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import batching  # noqa: PLC0415

    return await batching.bench_batch(setup)


async def _busy(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import busy  # noqa: PLC0415

    return await busy.bench_busy(
        args.model, runs=args.runs, load=args.load, programs=args.programs, seed=args.seed, tokens=args.max_new_tokens
    )


async def _disturbed(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.disturbed import bench  # noqa: PLC0415

    seeds = range(args.seed, args.seed + setup.prompts)
    return await bench.bench_disturbed(faults=args.cases, links=args.cells, texts=args.texts, seeds=seeds)


async def _draw(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.wan import draw  # noqa: PLC0415

    if args.file is None or args.out is None:
        raise BadRequest("draw needs a file to read and one to write: swarm bench draw FILE.json --out FILE.svg")
    return {"bench": "draw", "wrote": [str(path) for path in draw.draw(args.file, args.out)]}


async def _driver(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.wan import driver  # noqa: PLC0415

    return await driver.bench_driver(setup)


async def _exact(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import exact  # noqa: PLC0415

    nodes = (args.nodes,) if args.nodes else exact.NODES
    chat = args.texts == ["chat"]
    return await exact.bench_exact(setup, nodes=nodes, sizes=args.sizes or exact.SIZES, chat=chat)


async def _faults(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import faults  # noqa: PLC0415

    return await faults.bench_faults(setup, generations=args.generations, seed=args.seed)


async def _flips(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import bf16_flips  # noqa: PLC0415

    return await bf16_flips.bench_flips(setup)


async def _fuzz(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import fuzz  # noqa: PLC0415

    return await fuzz.bench_fuzz(setup, messages=args.messages)


async def _in_lab(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.wan import live  # noqa: PLC0415

    link = LabLink.parse(args.lab)
    return await live.bench_in_lab(args.which, setup, link=link, congestion=args.congestion, tree_size=args.tree_size)


async def _heal(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import heal  # noqa: PLC0415

    return await heal.bench_heal(setup, kills=args.kills, registry_kind=args.registry_kind, seed=args.seed)


async def _load(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import load  # noqa: PLC0415

    return await load.bench_load(setup, clients=args.clients)


async def _node(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.parts import node_append  # noqa: PLC0415

    return await node_append.bench_node(rounds=args.rounds, profile=args.profile)


async def _offload(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import offload  # noqa: PLC0415

    return await offload.bench_offload(setup, sizes=args.sizes or offload.SIZES)


async def _overhead(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import overhead  # noqa: PLC0415

    return await overhead.bench_overhead(setup)


async def _ports(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.parts import ports  # noqa: PLC0415

    return await ports.bench_ports(link=LabLink.parse(args.lab) if args.lab else None, beside=args.beside)


async def _proposals(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import proposals  # noqa: PLC0415

    sizes, chat = args.sizes or proposals.SIZES, args.texts == ["chat"]
    temperatures = args.temperatures or proposals.TEMPERATURES
    return await proposals.bench_proposals(setup, sizes=sizes, temperatures=temperatures, chat=chat)


async def _sampling(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.sampling import sampling  # noqa: PLC0415

    temperatures = args.temperatures or sampling.TEMPERATURES
    return await sampling.bench_sampling(setup, sizes=args.sizes or sampling.SIZES, temperatures=temperatures)


async def _trees(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks import trees  # noqa: PLC0415

    return await trees.bench_trees(setup, sizes=args.sizes or trees.SIZES)


async def _virtual_wan(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.wan import matrix, virtual  # noqa: PLC0415

    plan = matrix.MatrixPlan.of(args.cells, args.texts, args.temperatures, args.strategies)
    return await virtual.bench_virtual_wan(setup, plan, swift=args.swift)


async def _wan(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.wan import live, matrix  # noqa: PLC0415

    if setup.peers:
        return await live.bench_peers(setup, tree_size=args.tree_size)
    plan = matrix.MatrixPlan.of(args.cells, args.texts, args.temperatures, args.strategies)
    return await matrix.bench_matrix(setup, plan, report=matrix.print_to_stderr)
