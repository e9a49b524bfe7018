"""The snippets of documentation pages, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGES = [page for page in PAGES if "decisions" not in page.parts]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"(?:^|\s)#(?:\s.*)?$")
# What ends one command of a shell line.
OPERATORS = ";<>|&()"


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page."""

    page: Path
    language: str
    """Word after the fence: `sh`, `python`, or nothing for a terminal's contents."""
    code: str

    @property
    def lines(self) -> list[str]:
        """Shell lines to run, without comments; in a terminal's contents, those after the prompt `$`."""
        joined = re.sub(r" *\\\n\s*", " ", self.code).splitlines()
        typed = [line[2:] for line in joined if line.startswith("$ ")] if not self.language else joined
        return [line for line in (COMMENT.sub("", line).strip() for line in typed) if line]


def snippets(page: Path) -> list[Snippet]:
    """Return all fenced blocks of a page."""
    return [Snippet(page, match[1], match[2]) for match in FENCED.finditer(page.read_text("utf-8"))]


def split_commands(line: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell line; variables set before a command are left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=OPERATORS)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(OPERATORS):
            if words:
                yield words
            words = []
        elif words or not re.match(r"[A-Z_]+=", word):
            words.append(word)
