"""The program `swarm`: reads the command line, runs one command and prints an error as one line."""

import os
import sys
from collections.abc import Sequence

from treeswarm.programs.interrupts import (
    INTERRUPTED,
    SLOW_S,
    STOPPED,
    TERMINATED,
    end_process,
    interrupt_ends_process,
    ticking,
)

# All else is imported within functions, while Ctrl-C has no traceback: even the parser takes a tenth of a second.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

# Exit status if the reader of the output has gone.
BROKEN_PIPE = 141
# Module of each command, in the order of the help.  Only the module of the command that is given is imported.
COMMANDS = {
    "generate": "treeswarm_client.cli.generate",
    "chat": "treeswarm_client.cli.chat.command",
    "serve": "treeswarm_client.cli.serve",
    "status": "treeswarm_client.cli.status",
    "models": "treeswarm_client.cli.models",
    "doctor": "treeswarm_client.cli.doctor",
    "demo": "treeswarm_client.cli.demo",
}
EXAMPLES = """examples:
  swarm demo                                             a whole swarm on this machine, in a minute
  swarm models --registry 203.0.113.7:4001               which models a swarm serves
  swarm chat --model demo --registry 203.0.113.7:4001    chat with the model
  swarm generate "def main():" --model demo --registry 203.0.113.7:4001
  eval "$(swarm --print-completion bash)"                complete commands in bash; the same for swarm-node

`swarm COMMAND --help` shows a command's flags.  Every `swarm-node` prints its --registry flag when it starts."""


def make_parser(command: str | None = None) -> "argparse.ArgumentParser":
    """Return the parser of the command line, or what it needs for one command.

    Its flags stay compatible between releases.
    """
    import argparse  # noqa: PLC0415
    from importlib import import_module  # noqa: PLC0415

    from treeswarm import __version__  # noqa: PLC0415
    from treeswarm.programs.completion import add_completion_flag  # noqa: PLC0415
    from treeswarm_client.cli import measuring  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="swarm",
        description="Generate text with a large model whose blocks are spread over many machines.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"treeswarm {__version__}")
    add_completion_flag(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    names = [command] if command in COMMANDS else [] if command in measuring.COMMANDS else list(COMMANDS)
    for name in names:
        import_module(COMMANDS[name]).add_command(commands)
    if command not in COMMANDS:
        measuring.add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    It is 0 after success, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM, and 141 if the reader of the output
    has gone.  After a signal the process ends here.
    """
    with interrupt_ends_process():
        from treeswarm.errors import SwarmError  # noqa: PLC0415
        from treeswarm.programs.process import Terminated, printable, quieten_libraries  # noqa: PLC0415

        quieten_libraries(os.environ)
        _set_up_logging()
    try:
        with interrupt_ends_process(), ticking("starting", SLOW_S):
            args = _parse_arguments(sys.argv[1:] if arguments is None else arguments)
        return int(args.run(args))
    except SwarmError as error:
        print(f"swarm: {printable(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `swarm … | head`: Python must not report what it can no longer write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        end_process(INTERRUPTED, STOPPED)
    except Terminated:
        end_process(TERMINATED, STOPPED)


def _set_up_logging() -> None:
    """Show this project's own warnings; what libraries say is for those who ask for it."""
    import logging  # noqa: PLC0415

    from treeswarm.programs.process import PrintableFormatter, is_own_message, is_verbose  # noqa: PLC0415

    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("swarm: %(message)s"))
    if not is_verbose(os.environ):
        handler.addFilter(is_own_message)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Commands print the choice of a draft themselves, once the client is open.
    logging.getLogger("treeswarm_client.drafters").setLevel(logging.ERROR)


def _parse_arguments(arguments: Sequence[str]) -> "argparse.Namespace":
    """Parse the command line; `swarm serve` also takes settings from environment variables and a config file."""
    from treeswarm.programs.settings import parse  # noqa: PLC0415

    parser = make_parser(arguments[0] if arguments else None)
    if arguments[:1] == ["serve"]:
        return parse(parser, "serve", arguments, os.environ)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
