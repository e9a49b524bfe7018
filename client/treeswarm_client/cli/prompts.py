"""Where `swarm generate` has its prompts from: the command line, files, standard input."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from treeswarm.errors import BadRequest

STDIN = "-"


def read_prompt(prompt: str | None, file: Path | None, stdin: TextIO) -> str:
    """The one prompt.  Raises BadRequest where there is none, or two."""
    if prompt is not None and file is not None:
        raise BadRequest("PROMPT and --prompt-file are two prompts: leave one out")
    if prompt is None and file is None and stdin.isatty():
        raise BadRequest("there is no prompt: give PROMPT, --prompt-file FILE, or pipe one in (`… | swarm generate`)")
    if file is not None:
        return _without_line_end(_read(file, stdin))
    if prompt is None or prompt == STDIN:
        return _without_line_end(_read(Path(STDIN), stdin))
    return prompt


def read_prompts(file: Path, stdin: TextIO) -> list[str]:
    """One a line, blank lines left out.  Raises BadRequest, with the line's number for what is no prompt."""
    lines = _read(file, stdin).split("\n")
    told = ((number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip())
    prompts = list(_from_json(told, file)) if file.suffix == ".jsonl" else [line for _, line in told]
    if not prompts:
        raise BadRequest(f"{file} has no prompts: write one a line")
    return prompts


def _from_json(lines: Iterator[tuple[int, str]], file: Path) -> Iterator[str]:
    for number, line in lines:
        try:
            said = json.loads(line)
        except ValueError as error:
            raise BadRequest(f"{file} line {number} is no JSON ({error})") from None
        prompt = said.get("prompt") if isinstance(said, dict) else said
        if not isinstance(prompt, str):
            raise BadRequest(f'{file} line {number} has no prompt: write a JSON string or {{"prompt": "…"}}')
        yield prompt


def _read(file: Path, stdin: TextIO) -> str:
    name = "standard input" if str(file) == STDIN else str(file)
    try:
        if str(file) == STDIN:
            return stdin.read()
        # Line ends stay as they are: they are part of a prompt.
        with file.open(encoding="utf-8", newline="") as opened:
            return opened.read()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{name} is no UTF-8 text ({error}): convert it") from None
    except OSError as error:
        raise BadRequest(f"{name} cannot be read: {error.strerror}") from None


def _without_line_end(text: str) -> str:
    """Editors and `echo` add one that nobody means."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
