"""Prompts are read from the command line, from files and from standard input."""

import io
from pathlib import Path

import pytest

from treeswarm.errors import BadRequest
from treeswarm_client.cli.prompts import read_prompt, read_prompts


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_final_line_end_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"x = \r\n\n\r\n")
    assert read_prompt(None, file, Keyboard()) == "x = \r\n\n"
    assert read_prompt("-", None, io.StringIO("x = \n\n")) == "x = \n"
    assert read_prompt(None, None, io.StringIO("x = ")) == "x = "
    assert read_prompt("x = \n", None, io.StringIO("not read")) == "x = \n"


def test_missing_double_or_unreadable_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="pipe one in"):
        read_prompt(None, None, Keyboard())
    with pytest.raises(BadRequest, match="leave one out"):
        read_prompt("x", tmp_path / "file", Keyboard())
    with pytest.raises(BadRequest, match=r"absent\.txt cannot be read: No such file"):
        read_prompt(None, tmp_path / "absent.txt", Keyboard())
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadRequest, match="not UTF-8 text"):
        read_prompt(None, binary, Keyboard())


def test_prompts_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    plain = tmp_path / "prompts.txt"
    plain.write_text('first \n\n{"prompt": 1}\r\n  last')
    assert read_prompts(plain, Keyboard()) == ["first ", '{"prompt": 1}', "  last"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"a\\nb"\n{"prompt": "c", "id": 7}\n')
    assert read_prompts(lines, Keyboard()) == ["a\nb", "c"]
    assert read_prompts(Path("-"), io.StringIO("a\nb\n")) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "words"), [("{", "line 2 is not JSON"), ("7", "line 2 has no prompt"), ("{}", "line 2 has")]
)
def test_invalid_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"good"\n{line}\n')
    with pytest.raises(BadRequest, match=words):
        read_prompts(file, Keyboard())


def test_file_without_prompts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n")
    with pytest.raises(BadRequest, match="write one per line"):
        read_prompts(file, Keyboard())
