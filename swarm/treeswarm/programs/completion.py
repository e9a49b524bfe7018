"""`--print-completion SHELL`: a script that completes a program's commands, flags and paths in a shell."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
# Names of models may be directories.
FOLDERS = ("model", "draft")


def add_completion_flag(parser: argparse.ArgumentParser) -> None:
    """On the program's outermost parser, once; what is added to it later is completed too."""
    parser.add_argument(
        "--print-completion",
        action=_Print,
        choices=SHELLS,
        metavar="SHELL",
        default=argparse.SUPPRESS,
        help=f"print a completion script for {', '.join(SHELLS)} and exit",
    )


class _Print(argparse.Action):
    """Like --help, it ends the program."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        # Who asks for no script need not load it.
        import shtab  # noqa: PLC0415

        for action in _actions(parser):
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        print(shtab.complete(parser, str(values)))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                yield from _actions(inner)
