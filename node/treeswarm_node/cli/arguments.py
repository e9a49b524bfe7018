"""`swarm-node`'s command line, and the config that it results in."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from treeswarm import __version__
from treeswarm.programs.completion import add_completion_flag
from treeswarm.programs.settings import add_config_flag, parse
from treeswarm_node.config import NodeConfig
from treeswarm_node.flags import add_flags, read_flags

EXAMPLES = """examples:
  swarm-node demo
      start a new swarm with the bundled model; prints how others join it
  swarm-node demo --registry swarm:203.0.113.7:4001/7k3m-9qxt-…
      join a swarm by the code that its nodes print
  swarm-node demo --registry mqtts://me:secret@broker.example.org/ours
      join a swarm through an MQTT broker
  swarm-node doctor demo --device cuda
      check what would go wrong, and what to do about it
  swarm-node zai-org/GLM-4.6-FP8 --dry-run --memory 24GiB
      say whether and how a model fits on nodes of this size, and load nothing
  swarm-node pause; swarm-node resume
      have the machine to yourself for an hour
  swarm-node demo --blocks 0:3 --listen 127.0.0.1:4001
      host the model's first three blocks
  swarm-node ./Llama-3-8B --blocks 16:32 --listen 0.0.0.0:4002 --dtype bfloat16 --device cuda
      host a local model's second half on a GPU
  swarm-node demo --hours 22:00-07:00 --bandwidth 20mbit --device-share 0.5
      serve at night, with a part of the line and of the device
  swarm-node demo --swarm-key swarm.key
      join a private swarm, open only to those who have the same key file
  swarm-node demo --emulate-link delay=25ms,rate=100mbit
      send as if 25 ms away on a 100 Mbit/s line

MODEL is a Hugging Face causal-LM directory, a GGUF file, a hub id, smollm2 or demo.  Every flag can also be set by a
variable such as TREESWARM_MAX_SESSIONS, or by a line in the file given by --config or TREESWARM_CONFIG."""

USAGE = """swarm-node MODEL [flags]
  swarm-node demo                    start a swarm with the bundled model
  swarm-node MODEL --registry CODE   join one by the code that its nodes print
  swarm-node --help                  list all flags, with examples"""

DOCTOR_EXAMPLES = """examples:
  swarm-node doctor
      check this machine
  swarm-node doctor Qwen/Qwen3-8B --device cuda --dtype bfloat16 --listen 0.0.0.0:4001 --registry mqtts://…
      check what `swarm-node` with these flags would run into
  swarm-node doctor --registry 203.0.113.7:4001
      check whether the nodes there can reach this machine
  swarm-node doctor --json
      print one JSON object, for programs

It takes the flags, variables and config file of swarm-node.  The exit status is 1 if a check fails, else 0."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its flags are a promise to users."""
    parser = argparse.ArgumentParser(
        prog="swarm-node",
        usage=USAGE,
        description="Host a span of a model's decoder blocks for a swarm.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="model directory, GGUF file, hub id, `smollm2` or `demo`")
    add_node_flags(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say whether the model can be hosted, how large its blocks are, and how many nodes hold it; with "
        "--memory, for nodes with this much memory.  Only config and headers are read",
    )
    parser.add_argument("--json", action="store_true", help="print what --dry-run says as one JSON object")
    add_completion_flag(parser)
    return parser


def make_doctor_parser() -> argparse.ArgumentParser:
    """Return the parser of `swarm-node doctor`: that of `swarm-node`, with an optional model."""
    parser = argparse.ArgumentParser(
        prog="swarm-node doctor",
        description="Check this machine and its connection to a swarm.",
        epilog=DOCTOR_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", default="", help="model to be served (default: none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_node_flags(parser)
    return parser


def add_node_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how to serve; `swarm-node doctor` takes the same ones."""
    add_flags(parser, NodeConfig)
    add_config_flag(parser, "node")
    parser.add_argument("--version", action="version", version=f"treeswarm {__version__}")


def read_config(arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> NodeConfig:
    """Return the config that command line, variables and config file result in.  Raises BadRequest."""
    arguments = sys.argv[1:] if arguments is None else arguments
    environ = os.environ if environ is None else environ
    return config_from_arguments(parse(make_parser(), "node", arguments, environ))


def config_from_arguments(arguments: argparse.Namespace) -> NodeConfig:
    """Return the config that parsed arguments result in.  Raises BadRequest."""
    return read_flags(NodeConfig, arguments)
