"""Every command on a page of the documentation has flags that its program takes, and names extras that exist."""

import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest

from tests.support.page_snippets import PAGES, ROOT, snippets, split_commands
from treeswarm_client.cli.main import make_parser as make_swarm_parser
from treeswarm_node.cli.arguments import make_parser as make_node_parser
from treeswarm_node.cli.owner_commands import COMMANDS

PROGRAMS = ("swarm", "swarm-node")
EXTRAS = re.compile(r"(?:treeswarm|\.)\[([a-z,]+)\]")


def documented_commands() -> list[tuple[str, list[str]]]:
    return [
        (page.name, words)
        for page in PAGES
        for snippet in snippets(page)
        if snippet.language in ("", "sh")
        for line in snippet.lines
        for words in split_commands(line)
        if words[0] in PROGRAMS
    ]


def parse(program: str, arguments: list[str]) -> None:
    """Parse a command line with the program's own parser, which exits with status 2 for what it does not take."""
    if program == "swarm":
        make_swarm_parser().parse_args(arguments)
    elif arguments[0] == "doctor":
        make_node_parser().parse_args(arguments[1:])
    elif arguments[0] not in COMMANDS:
        make_node_parser().parse_args(arguments)


def test_commands_are_found_on_the_pages() -> None:
    commands = documented_commands()
    assert len(commands) > 30
    assert {page for page, _ in commands} >= {"README.md", "quick-start.md", "cli.md", "api.md", "host-a-node.md"}


@pytest.mark.parametrize(("page", "words"), documented_commands(), ids=lambda value: " ".join(value)[:60])
def test_flags_of_documented_commands_exist(page: str, words: list[str]) -> None:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            parse(words[0], words[1:])
    except SystemExit as exited:  # --help and --version end with status 0
        assert not exited.code, f"{page}: {' '.join(words)}\n{errors.getvalue()}"


def test_extras_named_on_the_pages_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = {
        (Path(page).name, extra)
        for page in PAGES
        for names in EXTRAS.findall(page.read_text("utf-8"))
        for extra in names.split(",")
    }
    assert len(named) > 5
    assert {extra for _, extra in named} <= set(project["optional-dependencies"])
