"""The benches of `swarm bench`: one line each, with an example."""

import argparse
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.lab.shape import LabLink

EXAMPLES = """examples:
  swarm bench exact --json                   20 prompts, 1 to 3 nodes, five tree sizes, against stock transformers
  swarm bench trees --prompts 4 --json       tokens per traversal by tree size, beside three baselines
  swarm bench proposals --speculator DIR --json   what the tail proposes beside other drafters; virtual clock
  swarm bench speculators --speculator DIR,DIR --json   kinds of speculators on the same texts; one process
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
  swarm bench concurrent --cells 25ms --json   1, 4 and 16 clients at once, by tree size; virtual clock
  swarm bench online --json                  a draft that learns from the target's answers in long texts; one process
  swarm bench outside --json                 rules, discounts and pools that stay outside, beside ours; one process
  swarm bench overhead --json                what a hop costs besides the model and the wire
  swarm bench node --profile --json          what an append costs a node besides the model, in one process
  swarm bench planner --json                 how much of a round the planner takes, on simulated links
  swarm bench attention --device cuda --json   the torch reference beside the flash kernels
  swarm bench rules --json                   what penalties cost a tail, beside transformers' processors on whole rows
  swarm bench faults --json                  100 generations, each hit by a kill, a hang, a cut, a refusal or a drain
  swarm bench grammars --model smollm2 --prompts 100 --json   texts after random JSON schemas; virtual clock
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

RunBench = Callable[[BenchSetup, argparse.Namespace], Coroutine[None, None, dict[str, Any]]]
Arguments = Callable[[BenchSetup, argparse.Namespace], dict[str, Any]]


def _bench(place: str, arguments: Arguments) -> RunBench:
    """Return a bench: `place` is MODULE:FUNCTION below `treeswarm_bench.benchmarks`."""
    return partial(_run, place, arguments)


async def _run(place: str, arguments: Arguments, setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    # Each bench is imported when it runs, so that it loads only what it uses: many bring torch or matplotlib.
    module, function = place.split(":")
    imported = import_module(f"treeswarm_bench.benchmarks.{module}")
    result: dict[str, Any] = await getattr(imported, function)(**arguments(setup, args))
    return result


def _given(**flags: Any) -> dict[str, Any]:
    """Return the flags that the user gave: for the others, a bench has its own defaults."""
    return {name: value for name, value in flags.items() if value is not None}


def _is_chat(args: argparse.Namespace) -> bool:
    return bool(args.texts == ["chat"])


def _matrix_plan(args: argparse.Namespace) -> Any:
    from treeswarm_bench.benchmarks.wan.matrix import MatrixPlan  # noqa: PLC0415

    return MatrixPlan.of(args.cells, args.texts, args.temperatures, args.strategies)


def _cases(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    seeds = range(args.seed, args.seed + setup.prompts)
    return {"faults": args.cases, "links": args.cells, "texts": args.texts, "seeds": seeds}


def _demos(_: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    flags = {name: getattr(args, name) for name in ("model", "runs", "load", "programs", "seed")}
    return flags | {"tokens": args.max_new_tokens}


def _kills(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    return {"setup": setup, "kills": args.kills, "registry_kind": args.registry_kind, "seed": args.seed}


def _texts(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    nodes = (args.nodes,) if args.nodes else None
    return {"setup": setup, "chat": _is_chat(args)} | _given(nodes=nodes, sizes=args.sizes)


def _setup(setup: BenchSetup, _: argparse.Namespace) -> dict[str, Any]:
    return {"setup": setup}


def _nothing(_: BenchSetup, __: argparse.Namespace) -> dict[str, Any]:
    return {}


def _sizes(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    return {"setup": setup} | _given(sizes=args.sizes)


def _sizes_and_temperatures(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    return {"setup": setup} | _given(sizes=args.sizes, temperatures=args.temperatures)


def _proposals(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    return _kinds(setup, args) | {"flat_ms": args.flat_ms} | _given(cells=args.cells)


def _kinds(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    return _sizes_and_temperatures(setup, args) | {"chat": _is_chat(args)}


def _lab_link(_: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    return {"link": LabLink.parse(args.lab) if args.lab else None, "beside": args.beside}


def _attention(_: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    return {"device": args.device, "threads": args.threads, "seconds": args.seconds}


async def _wan(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    from treeswarm_bench.benchmarks.wan import live, matrix  # noqa: PLC0415

    if setup.peers:
        return await live.bench_peers(setup, tree_size=args.tree_size)
    return await matrix.bench_matrix(setup, _matrix_plan(args), report=matrix.print_to_stderr)


async def bench_in_lab(setup: BenchSetup, args: argparse.Namespace) -> dict[str, Any]:
    """Run `overhead` or `wan` with `--lab`."""
    from treeswarm_bench.benchmarks.wan import live  # noqa: PLC0415

    link = LabLink.parse(args.lab)
    return await live.bench_in_lab(args.which, setup, link=link, congestion=args.congestion, tree_size=args.tree_size)


BENCHES: Mapping[str, RunBench] = {
    "attention": _bench("parts.attention:bench_attention", _attention),
    "batch": _bench("batching:bench_batch", _setup),
    "busy": _bench("busy:bench_busy", _demos),
    "concurrent": _bench("disturbed.concurrent:bench_concurrent", lambda _, a: {"links": a.cells, "seed": a.seed}),
    "disturbed": _bench("disturbed.bench:bench_disturbed", _cases),
    "draw": _bench("wan.draw:bench_draw", lambda _, args: {"source": args.file, "out": args.out}),
    "driver": _bench("wan.driver:bench_driver", _setup),
    "exact": _bench("exact:bench_exact", _texts),
    "faults": _bench("faults:bench_faults", lambda s, a: {"setup": s, "generations": a.generations, "seed": a.seed}),
    "flips": _bench("bf16_flips:bench_flips", _setup),
    "fuzz": _bench("fuzz:bench_fuzz", lambda setup, args: {"setup": setup, "messages": args.messages}),
    "grammars": _bench("grammars:bench_grammars", lambda setup, args: {"setup": setup, "seed": args.seed}),
    "heal": _bench("heal:bench_heal", _kills),
    "load": _bench("load:bench_load", lambda setup, args: {"setup": setup, "clients": args.clients}),
    "node": _bench("parts.node_append:bench_node", lambda _, a: {"rounds": a.rounds, "profile": a.profile}),
    "offload": _bench("offload:bench_offload", _sizes),
    "online": _bench("sampling.online:bench_online", _setup),
    "outside": _bench("sampling.outside:bench_outside", _sizes_and_temperatures),
    "overhead": _bench("overhead:bench_overhead", _setup),
    "planner": _bench("parts.planner_time:bench_planner", _nothing),
    "ports": _bench("parts.ports:bench_ports", _lab_link),
    "proposals": _bench("proposals:bench_proposals", _proposals),
    "registry": _bench("parts.registry:bench_registry", _nothing),
    "rules": _bench("parts.rules:bench_rules", _nothing),
    "sampling": _bench("sampling.sampling:bench_sampling", _sizes_and_temperatures),
    "speculators": _bench("parts.speculators:bench_speculators", _kinds),
    "tls": _bench("parts.tls:bench_tls", _nothing),
    "trees": _bench("trees:bench_trees", _sizes),
    "virtual-wan": _bench(
        "wan.virtual:bench_virtual_wan", lambda s, a: {"setup": s, "plan": _matrix_plan(a), "swift": a.swift}
    ),
    "wan": _wan,
}
