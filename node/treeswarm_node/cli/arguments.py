"""`swarm-node`'s command line, and the config it makes."""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from treeswarm import __version__
from treeswarm.errors import BadRequest
from treeswarm.programs.completion import add_completion_flag
from treeswarm.programs.settings import add_config_flag, parse
from treeswarm.protocol.spans import Span
from treeswarm.transport.emulated import parse_rate
from treeswarm_node.config import NodeConfig, NodeLimits
from treeswarm_node.schedule import Schedule

EXAMPLES = """examples:
  swarm-node demo                                        begin a swarm; prints how others join
  swarm-node demo --registry dht:/ip4/203.0.113.7/tcp/4002/p2p/12D3KooW…    join one
  swarm-node demo --registry mqtts://me:secret@broker.example.org/ours      the same through a broker
  swarm-node doctor demo --device cuda                   what would go wrong, and what to do about it
  swarm-node pause; swarm-node resume                    have the machine back for an hour
  swarm-node demo --blocks 0:3 --listen 127.0.0.1:4001   serve its first three blocks
  swarm-node ./Llama-3-8B --blocks 16:32 --listen 0.0.0.0:4002 --dtype bfloat16 --device cuda
  swarm-node demo --hours 22:00-07:00 --bandwidth 20mbit --device-share 0.5   the nights, and not the whole line
  swarm-node demo --swarm-key swarm.key                  for those alone who have the same key file
  swarm-node demo --emulate-link delay=25ms,rate=100mbit as if 25 ms away on a 100 Mbit/s line

the model is a Hugging Face causal-LM directory, a hub id, or demo; every flag can also be a variable such as
TREESWARM_MAX_SESSIONS, or a line in the file given by --config or TREESWARM_CONFIG"""


def parser() -> argparse.ArgumentParser:
    """The command line; the flags are a promise to users."""
    made = argparse.ArgumentParser(
        prog="swarm-node",
        description="Host a span of a model's decoder blocks for a swarm.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("model", metavar="MODEL", help="model directory, hub id, or `demo`")
    add_node_flags(made)
    add_completion_flag(made)
    return made


def add_node_flags(made: argparse.ArgumentParser) -> None:
    """How to serve: whoever checks that takes the same."""
    made.add_argument("--revision", metavar="REV", help="of a hub id: branch, tag or commit (default: the main branch)")
    made.add_argument(
        "--blocks", metavar="START:END", help="decoder blocks to serve (default: those that help the swarm most)"
    )
    made.add_argument("--num-blocks", type=int, metavar="N", help="how many to choose (default: as many as fit)")
    made.add_argument("--memory", metavar="SIZE", help="use no more than this, such as 6GiB (default: what is free)")
    made.add_argument("--listen", metavar="HOST:PORT", default="0.0.0.0:0", help="default: everywhere, a free port")
    made.add_argument("--announce", metavar="HOST:PORT", help="where others reach it, behind a router (default: found)")
    made.add_argument(
        "--registry",
        metavar="SPEC",
        help="dht:ADDRESS,… of a swarm to join, mqtts://USER:PASSWORD@HOST/NAMESPACE, or none (default: a new swarm)",
    )
    made.add_argument(
        "--lend-ports", type=int, default=4, metavar="N", help="to nodes behind routers, at most so many; 0: none (4)"
    )
    made.add_argument(
        "--lend-from", type=int, default=0, metavar="PORT", help="lend this port and the next ones (default: free ones)"
    )
    made.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="to finish sessions on leaving (30)")
    made.add_argument("--max-sessions", type=int, default=256, metavar="N", help="open at once (default 256)")
    made.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "auto"], default="float32",
        help="auto: bfloat16 where the device computes in it, else float32 (default float32)",
    )  # fmt: skip
    made.add_argument(
        "--quantization", choices=["none", "int8", "nf4"], default="none", help="of weights: 8 or 4 bits (default none)"
    )
    made.add_argument(
        "--activations", choices=["native", "int8"], default="native",
        help="between nodes: as computed, or in 8 bits, which changes the text (default native)",
    )  # fmt: skip
    made.add_argument(
        "--compression", choices=["auto", "none", "lossless"], default="auto",
        help="between nodes, losing nothing; auto: of 16-bit values, on lines where it pays (default auto)",
    )  # fmt: skip
    made.add_argument(
        "--attention", choices=["auto", "torch", "flash"], default="auto",
        help="flash: torch's kernels for long texts; auto: those on CUDA where they compute right (default auto)",
    )  # fmt: skip
    made.add_argument(
        "--offload", choices=["none", "ram", "disk"], default="none",
        help="host more blocks than the device holds: their weights wait there (default none)",
    )  # fmt: skip
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default cpu)")
    made.add_argument(
        "--device-share", type=float, default=1.0, metavar="SHARE", help="use it at most this share of the time (1)"
    )
    made.add_argument("--kv-tokens", type=int, default=16384, help="KV cache rows for all sessions (default 16384)")
    made.add_argument("--threads", type=int, default=0, help="CPU threads for the model (default: torch's choice)")
    made.add_argument(
        "--bandwidth", metavar="RATE", help="send no more than this, such as 20mbit (default: as the line takes it)"
    )
    made.add_argument(
        "--hours", metavar="HH:MM-HH:MM", help="serve then and pause else, local time, such as 22:00-07:00 (all day)"
    )
    made.add_argument("--emulate-link", metavar="SHAPE", help="delay what this node sends: delay=25ms,rate=100mbit")
    made.add_argument(
        "--identity", type=Path, metavar="PATH", help="this node's keys, made at its first start (default: per user)"
    )
    made.add_argument("--swarm-key", type=Path, metavar="PATH", help="key file of a private swarm (default: open)")
    made.add_argument(
        "--metrics", metavar="HOST:PORT", help="answer Prometheus there, without any password (default: nowhere)"
    )
    made.add_argument(
        "--no-panel", dest="panel", action="store_false", help="log lines on a terminal too, in place of a live picture"
    )
    made.add_argument("--log-format", choices=["text", "json"], default="text", help="json: one object a line")
    made.add_argument("--verbose", action="store_true", help="log every session")
    add_config_flag(made, "node")
    made.add_argument("--version", action="version", version=f"treeswarm {__version__}")


def read_config(
    arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> tuple[NodeConfig, bool]:
    """Command line, variables and config file as a config, and whether to be verbose.  Raises BadRequest."""
    args = parse(
        parser(), "node", sys.argv[1:] if arguments is None else arguments, os.environ if environ is None else environ
    )
    return config_of(args), args.verbose


def config_of(args: argparse.Namespace) -> NodeConfig:
    """What the flags say.  Raises BadRequest."""
    if args.kv_tokens < 1:
        raise BadRequest(f"--kv-tokens {args.kv_tokens} leaves no room for any session: give some thousand")
    if args.threads < 0:
        raise BadRequest(f"--threads {args.threads} is no number of threads")
    if args.lend_ports < 0 or not 0 <= args.lend_from < 2**16 - max(0, args.lend_ports):
        raise BadRequest(
            f"--lend-ports {args.lend_ports} --lend-from {args.lend_from} are no ports: give some below 65536"
        )
    if args.num_blocks is not None and args.num_blocks < 1:
        raise BadRequest(f"--num-blocks {args.num_blocks} hosts nothing: give at least 1")
    return NodeConfig(
        model=args.model,
        revision=args.revision,
        span=Span.parse(args.blocks) if args.blocks else None,
        listen=args.listen,
        dtype=args.dtype,
        quantization=args.quantization,
        activations="" if args.activations == "native" else args.activations,
        compression=args.compression,
        attention=args.attention,
        offload=args.offload,
        device=args.device,
        kv_tokens=args.kv_tokens,
        threads=args.threads,
        emulate_link=args.emulate_link,
        log_json=args.log_format == "json",
        identity=args.identity,
        swarm_key=args.swarm_key,
        registry=args.registry,
        announce=args.announce,
        num_blocks=args.num_blocks,
        memory=parse_size(args.memory) if args.memory else None,
        device_share=args.device_share,
        lend_from=args.lend_from,
        metrics=args.metrics,
        bandwidth=parse_rate(args.bandwidth) if args.bandwidth else None,
        hours=Schedule.parse(args.hours) if args.hours else None,
        panel=args.panel,
        limits=NodeLimits(sessions=args.max_sessions, grace_s=args.grace, lend_ports=args.lend_ports),
    )


def parse_size(text: str) -> int:
    """`6GiB`, `500MB` or bytes.  Raises BadRequest."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B?", text)
    if match is None:
        raise BadRequest(f"'{text}' is no size: give something like 6GiB or 500MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
