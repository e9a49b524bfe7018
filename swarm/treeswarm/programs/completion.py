"""`--print-completion SHELL`: print a script that completes a program's commands, flags and paths in a shell."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
# The value of these arguments may be a directory.
FOLDERS = ("model", "draft")


def add_completion_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag to the program's outermost parser, once.  Arguments added to the parser later are completed too."""
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        default=argparse.SUPPRESS,
        help=f"print a completion script for {', '.join(SHELLS)} and exit",
    )


class _PrintCompletion(argparse.Action):
    """Print the script and end the program, as --help does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        # Only this flag needs shtab, so it is not loaded at every start of the program.
        import shtab  # noqa: PLC0415

        for action in _actions(parser):
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        print(shtab.complete(parser, str(values)))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the actions of a parser and of all its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in dict.fromkeys(action.choices.values()):
                yield from _actions(subparser)
