"""The program `swarm`: reads the command line, runs one command, turns errors into one line."""

import argparse
import logging
import sys
from collections.abc import Sequence

from treeswarm import __version__
from treeswarm.errors import SwarmError
from treeswarm_client.cli import bench, demo, generate, serve, simulate, status

INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """The command line; the flags are a promise to users."""
    made = argparse.ArgumentParser(
        prog="swarm",
        description="Generate text with a large model that lives on many machines.",
        epilog="`swarm COMMAND --help` has examples.",
    )
    made.add_argument("--version", action="version", version=f"treeswarm {__version__}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (generate, serve, status, demo, bench, simulate):
        command.add_command(commands)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 after an error told in one line; 130 after Ctrl-C."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="swarm: %(message)s")
    try:
        return int(args.run(args))
    except SwarmError as error:
        print(f"swarm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
