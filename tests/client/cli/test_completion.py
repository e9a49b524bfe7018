"""Completion scripts work in the shells for which they are printed."""

import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
COMPLETE = """
source /dev/stdin
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_{function} && printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def script(program: str, shell: str) -> str:
    command = [BIN / program, "--print-completion", shell]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("program", ["swarm", "swarm-node"])
def test_bash_accepts_the_script(program: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script(program, "bash"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
@pytest.mark.parametrize("program", ["swarm", "swarm-node"])
def test_other_shells_get_a_script(program: str, shell: str) -> None:
    printed = script(program, shell)
    assert program in printed
    assert "swarm-key" in printed or shell == "tcsh"  # tcsh completes the names of subcommands only


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("swarm", "ch"), "chat"),
        (("swarm", "chat", "--te"), "--temperature"),
        (("swarm", "generate", "--dtype", "b"), "bfloat16"),
        (("swarm", "generate", "--prompt-file", "pro"), "prompt.txt"),
        (("swarm", "models", "--swarm-key", "pro"), "prompt.txt"),
        (("swarm-node", "--identity", "pro"), "prompt.txt"),
        (("swarm-node", "--act"), "--activations"),
        (("swarm", "chat", "--model", "fol"), "folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bash_completes_words(tmp_path: Path, words: tuple[str, ...], offered: str) -> None:
    (tmp_path / "prompt.txt").touch()
    (tmp_path / "folder").mkdir()
    commands = COMPLETE.format(words=" ".join(words), function=words[0].replace("-", "_"))
    done = subprocess.run(
        ["bash", "-c", commands],
        input=script(words[0], "bash"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert offered in done.stdout.split(), done.stderr


def test_unknown_shell_is_refused() -> None:
    command = [BIN / "swarm", "--print-completion", "ksh"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "bash" in done.stderr
