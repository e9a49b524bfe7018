"""The commands `bench`, `simulate` and `train-speculator`, which live in the separate package `treeswarm_bench`."""

import argparse
from importlib import import_module
from importlib.util import find_spec

from treeswarm.errors import BadRequest
from treeswarm.extras import install_command

PACKAGE = "treeswarm_bench"
COMMANDS = {
    "bench": ("treeswarm_bench.cli", "measure exactness and speed with real nodes on this machine"),
    "simulate": ("treeswarm_bench.simulate.cli", "see how a swarm of thousands of nodes places blocks and routes"),
    "train-speculator": (
        "treeswarm_bench.speculators.command",
        "train a head that guesses a model's next tokens beside its last block",
    ),
}


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add these commands; where the package is not installed, each says how to install it."""
    installed = find_spec(PACKAGE) is not None
    for name, (module, summary) in COMMANDS.items():
        if installed:
            import_module(module).add_command(commands)
        else:
            _add_placeholder(commands, name, summary)


def _add_placeholder(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str) -> None:
    """Add a command that takes any arguments, flags of the missing command included, and is refused when it runs."""
    parser = commands.add_parser(
        name, help=f"{summary} ({install_command('bench')})", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=_refuse)


def _refuse(args: argparse.Namespace) -> int:
    raise BadRequest(f"swarm {args.command} is not installed here: {install_command('bench')}")
