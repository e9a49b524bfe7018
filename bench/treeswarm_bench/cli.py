"""`swarm bench`: repeat the figures of docs/benchmarks.md on this machine."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
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
from treeswarm_bench.commands import BENCHES, EXAMPLES, bench_in_lab
from treeswarm_bench.flags import add_flags
from treeswarm_bench.lab.shape import LabLink
from treeswarm_client.cli.checks import check_at_least

# With these, the whole matrix of wan takes some 40 minutes on two idle cores.
PROMPTS = {"driver": 3, "exact": 20, "online": 3, "sampling": 16, "wan": 3, "virtual-wan": 4, "disturbed": 2}
TOKENS = {"driver": 48, "exact": 128, "faults": 96, "online": 2000, "wan": 20, "virtual-wan": 32}
# A node of two or three blocks, streamed through two slots, would keep most of them in memory.
NODES = {"offload": 1}
DRAFTS = {"driver": "auto", "wan": "auto", "virtual-wan": "auto"}
PEERS_BENCHES = ("overhead", "wan")
"""Benches that can measure nodes that they did not start."""
LAB_BENCHES = (*PEERS_BENCHES, "ports")
WIDENED_BENCHES = ("batch", "offload")
"""Benches of what is bound by reading weights."""


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
    parser.add_argument("which", choices=sorted(BENCHES), metavar="BENCH", help=", ".join(sorted(BENCHES)))
    add_flags(parser)
    parser.set_defaults(run=_run)


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
    bench = bench_in_lab if args.lab and args.which in PEERS_BENCHES else BENCHES[args.which]

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
