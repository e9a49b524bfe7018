"""Reads the prompts of `swarm generate` from the command line, files or standard input."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from treeswarm.errors import BadRequest

STDIN = "-"


def read_prompt(prompt: str | None, file: Path | None, stdin: TextIO) -> str:
    """Return the one prompt.  Raises BadRequest if there is none, or if there are two."""
    if prompt is not None and file is not None:
        raise BadRequest("PROMPT and --prompt-file are two prompts: leave one out")
    if prompt is None and file is None and stdin.isatty():
        raise BadRequest("there is no prompt: give PROMPT or --prompt-file FILE, or pipe one in (`… | swarm generate`)")
    if file is not None:
        return _strip_line_end(_read(file, stdin))
    if prompt is None or prompt == STDIN:
        return _strip_line_end(_read(Path(STDIN), stdin))
    return prompt


def read_prompts(file: Path, stdin: TextIO) -> list[str]:
    """Return one prompt per line, without blank lines.  Raises BadRequest, with the number of an invalid line."""
    lines = _read(file, stdin).split("\n")
    numbered = ((number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip())
    prompts = list(_parse_json(numbered, file)) if file.suffix == ".jsonl" else [line for _, line in numbered]
    if not prompts:
        raise BadRequest(f"{file} has no prompts: write one per line")
    return prompts


def _parse_json(lines: Iterator[tuple[int, str]], file: Path) -> Iterator[str]:
    for number, line in lines:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise BadRequest(f"{file} line {number} is not JSON ({error}): correct it") from None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise BadRequest(f'{file} line {number} has no prompt: write a JSON string or {{"prompt": "…"}}')
        yield prompt


def _read(file: Path, stdin: TextIO) -> str:
    name = "standard input" if str(file) == STDIN else str(file)
    try:
        if str(file) == STDIN:
            return stdin.read()
        # Line ends are part of a prompt and are kept as they are.
        with file.open(encoding="utf-8", newline="") as opened:
            return opened.read()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{name} is not UTF-8 text ({error}): convert it") from None
    except OSError as error:
        raise BadRequest(f"{name} cannot be read: {error.strerror}") from None


def _strip_line_end(text: str) -> str:
    """Remove one line end from the end of a text: editors and `echo` add it."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
