"""The program `swarm`: reads the command line, runs one command and prints an error as one line."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from treeswarm import __version__
from treeswarm.errors import SwarmError
from treeswarm.programs.completion import add_completion_flag
from treeswarm.programs.settings import parse
from treeswarm_client import drafters
from treeswarm_client.cli import demo, doctor, generate, measuring, models, serve, status
from treeswarm_client.cli.chat import command as chat
from treeswarm_client.cli.signals import Terminated

# Exit statuses after Ctrl-C, after SIGTERM, and if the reader of the output has gone.
INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141
EXAMPLES = """examples:
  swarm demo                                             a whole swarm on this machine, in a minute
  swarm models --registry 203.0.113.7:4001               which models a swarm serves
  swarm chat --model demo --registry 203.0.113.7:4001    chat with the model
  swarm generate "def main():" --model demo --registry 203.0.113.7:4001
  eval "$(swarm --print-completion bash)"                complete commands in bash; the same for swarm-node

`swarm COMMAND --help` shows a command's flags.  Every `swarm-node` prints its --registry flag when it starts."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line.  Its flags stay compatible between releases."""
    parser = argparse.ArgumentParser(
        prog="swarm",
        description="Generate text with a large model whose blocks are spread over many machines.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"treeswarm {__version__}")
    add_completion_flag(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (generate, chat, serve, status, models, doctor, demo):
        command.add_command(commands)
    measuring.add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    It is 0 after success, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM, and 141 if the reader of the output
    has gone.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="swarm: %(message)s")
    # Commands print the choice of a draft themselves, once the client is open.
    logging.getLogger(drafters.__name__).setLevel(logging.ERROR)
    try:
        args = _parse_arguments(arguments)
        return int(args.run(args))
    except SwarmError as error:
        print(f"swarm: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `swarm … | head`: Python must not report what it can no longer write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print("stopped", file=sys.stderr)
        return TERMINATED


def _parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `swarm serve` also takes settings from environment variables and a config file."""
    if arguments[:1] == ["serve"]:
        return parse(make_parser(), "serve", arguments, os.environ)
    return make_parser().parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
