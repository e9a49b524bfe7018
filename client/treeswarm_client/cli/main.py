"""The program `swarm`: reads the command line, runs one command, turns errors into one line."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from treeswarm import __version__
from treeswarm.errors import SwarmError
from treeswarm.programs.completion import add_completion_flag
from treeswarm.programs.settings import parse
from treeswarm_client.cli import demo, doctor, generate, measuring, models, serve, status
from treeswarm_client.cli.chat import command as chat
from treeswarm_client.cli.signals import Terminated

INTERRUPTED = 130
TERMINATED = 143
NOBODY_READS = 141
EXAMPLES = """examples:
  swarm demo                                             everything on this machine, in a minute
  swarm models --registry 203.0.113.7:4001               what a swarm serves
  swarm chat --model demo --registry 203.0.113.7:4001    talk with it
  swarm generate "def main():" --model demo --registry 203.0.113.7:4001
  eval "$(swarm --print-completion bash)"                complete all of this in bash; the same for swarm-node

`swarm COMMAND --help` has more.  A line for --registry is printed by every `swarm-node` when it starts."""


def make_parser() -> argparse.ArgumentParser:
    """The command line; the flags are a promise to users."""
    made = argparse.ArgumentParser(
        prog="swarm",
        description="Generate text with a large model that lives on many machines.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"treeswarm {__version__}")
    add_completion_flag(made)
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (generate, chat, serve, status, models, doctor, demo):
        command.add_command(commands)
    measuring.add_commands(commands)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 after an error told in one line; 130 after Ctrl-C, 143 after SIGTERM;
    141 where nobody reads the output."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="swarm: %(message)s")
    try:
        args = _parse_arguments(arguments)
        return int(args.run(args))
    except SwarmError as error:
        print(f"swarm: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `swarm … | head`: what Python still holds must not be told as an error at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print("stopped", file=sys.stderr)
        return TERMINATED


def _parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """A service is also told by variables and a config file; what people type takes the command line alone."""
    if arguments[:1] == ["serve"]:
        return parse(make_parser(), "serve", arguments, os.environ)
    return make_parser().parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
