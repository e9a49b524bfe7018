"""`swarm chat` with real nodes: at a pseudo-terminal, and through pipes."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.terminal import CTRL_C, CTRL_D, TAB, at_a_terminal

from treeswarm.model_files import resolve_model
from treeswarm_client import SwarmClient
from treeswarm_client.local_swarm import HostCommand, LocalSwarm, even_cuts, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")

BIN = Path(sys.executable).parent
# Longer than a unit of shared prefixes.
LONG = "def copy(source, target, follow=True, times=None): " * 8


def chat(swarm: LocalSwarm, *flags: str) -> list[str | Path]:
    return [BIN / "swarm", "chat", "--model", "demo", "--peers", swarm.peers, "--draft", "ngram", *flags]


async def piped(swarm: LocalSwarm, typed: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = chat(swarm, *flags)
    return await asyncio.to_thread(
        subprocess.run, command, input=typed, capture_output=True, text=True, timeout=120, check=False
    )


async def told(swarm: LocalSwarm, typed: str, *flags: str) -> list[dict[str, Any]]:
    done = await piped(swarm, typed, "--json", *flags)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


async def test_ctrl_c_stops_the_answer_and_not_the_chat(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    state, saved = tmp_path / "state", tmp_path / "saved.json"
    await asyncio.to_thread(_at_the_terminal, three_nodes, state, saved)
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "# careful"
    assert messages[1]["content"] == "import os\nimport sys"
    assert messages[3]["content"] == "/not a command\n  \\"
    # What was stopped is what the model would have said, as far as it came.
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="ngram") as client:
        for asked, answered in ((messages[:2], messages[2]), (messages[:4], messages[4])):
            whole = await client.generate(client.encode_chat(asked), max_new_tokens=600)
            assert 0 < len(answered["content"]) < len(whole.text)
            assert whole.text.startswith(answered["content"])
    history = state / "treeswarm" / "chat_history"
    assert {"import sys", "/stats"} <= set(history.read_text().split("\n"))
    assert history.stat().st_mode & 0o777 == 0o600


def _at_the_terminal(swarm: LocalSwarm, state: Path, saved: Path) -> None:
    # One token a round trip over slow links: an answer of a minute, certain to be in its middle.
    command = chat(swarm, "--tree-size", "0", "--max-new-tokens", "1500", "--emulate-link", "delay=25ms")
    with at_a_terminal([*command, "--system", "# careful"], {"XDG_STATE_HOME": str(state)}) as terminal:
        terminal.see("Ctrl-D leaves")
        terminal.see("> ")
        terminal.type("import os\\")
        terminal.see(". ")
        terminal.type("import sys")
        terminal.see("import sys\r\n")
        terminal.see_some()
        terminal.press(CTRL_C)
        terminal.see("/retry asks again")
        terminal.see("> ")
        for line in ('"""', "/not a command", "  \\"):
            terminal.type(line)
            terminal.see("\n. ")
        terminal.type('"""')
        terminal.see('"""\r\n')
        terminal.see_some()
        terminal.press(CTRL_C)
        terminal.see("/retry asks again")
        terminal.see("> ")
        terminal.press(b"half a word")
        terminal.see("half a word")
        terminal.press_until(CTRL_C, "Ctrl-D or /quit leaves")
        terminal.see("> ")
        terminal.press(b"/st" + TAB + b"\r")
        assert "2 answers" in terminal.see("of which nodes had")
        terminal.see("> ")
        terminal.type(f"/save {saved}")
        terminal.see("5 messages are in")
        terminal.see("> ")
        terminal.press(CTRL_D)
        assert terminal.left() == 0


async def test_ctrl_d_typed_during_an_answer_leaves_after_it(three_nodes: LocalSwarm) -> None:
    def typed() -> None:
        command = chat(three_nodes, "--tree-size", "0", "--max-new-tokens", "60", "--emulate-link", "delay=25ms")
        with at_a_terminal([*command, "--no-history"], {}) as terminal:
            terminal.see("> ")
            terminal.type("import os")
            terminal.see("import os\r\n")
            terminal.see_some()
            terminal.press(CTRL_D)
            terminal.see("ended at 60 tokens")
            assert terminal.left() == 0

    await asyncio.to_thread(typed)


async def test_colours_are_there_if_asked_for_and_not_forbidden(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    def shown(*flags: str, **environment: str) -> str:
        environment |= {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)}
        with at_a_terminal(chat(three_nodes, "--max-new-tokens", "8", "--no-history", *flags), environment) as terminal:
            terminal.see("finding nodes")
            terminal.see("> ")
            terminal.type("import os")
            seen = terminal.see("--max-new-tokens N")
            terminal.type("/quit")
            assert terminal.left() == 0
        return seen

    coloured = await asyncio.to_thread(shown, "--colours")
    assert "\x1b[35m" in coloured  # the second traversal's
    assert "\x1b[35m" not in await asyncio.to_thread(shown)
    assert "\x1b[35m" not in await asyncio.to_thread(lambda: shown("--colours", NO_COLOR="1"))
    assert not await asyncio.to_thread(lambda: list(tmp_path.iterdir()))  # --no-history


async def test_a_second_turn_begins_where_the_first_ended(three_nodes: LocalSwarm) -> None:
    first, second = await told(three_nodes, f"{LONG}\nand now\n", "--max-new-tokens", "16")
    assert first["question"] == LONG
    assert first["prefix_tokens"] == 0
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert second["prefix_tokens"] >= first["prompt_tokens"] // 64 * 64 > 0
    assert first["finish_reason"] == "length"


async def test_piped_lines_are_messages_and_answers_are_printed(three_nodes: LocalSwarm) -> None:
    typed = "import os\n\nx = 1\\\ny = 2"
    answers = await told(three_nodes, typed, "--max-new-tokens", "12")
    assert [answer["question"] for answer in answers] == ["import os", "x = 1\ny = 2"]
    done = await piped(three_nodes, typed, "--max-new-tokens", "12")
    assert (done.returncode, done.stderr) == (0, "")
    texts = [answer["text"] for answer in answers]
    assert done.stdout == "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)


async def test_commands_change_what_is_asked(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    typed = ["import os", "/retry", "/undo", "import os", "/system # strictly", "x = 1", "/new", "import os"]
    flags = ("--max-new-tokens", "12", "--temperature", "1", "--seed", "3")
    first, retried, undone, strict, new = await told(three_nodes, "\n".join(typed), *flags)
    assert retried["prompt_tokens"] == undone["prompt_tokens"] == first["prompt_tokens"]
    assert retried["text"] != first["text"]  # another sample
    assert undone["text"] == first["text"]  # as if the try in between had not been
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="ngram") as client:
        system = {"role": "system", "content": "# strictly"}
        talk = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": undone["text"]}]
        talk.append({"role": "user", "content": "x = 1"})
        assert strict["prompt_tokens"] == len(client.encode_chat([system, *talk]))
        assert new["prompt_tokens"] == len(client.encode_chat([system, talk[0]]))


async def test_an_answer_ends_at_a_stop_text(three_nodes: LocalSwarm) -> None:
    (answer,) = await told(three_nodes, "import os", "--stop", "join")
    assert answer["finish_reason"] == "stop"
    assert answer["text"].startswith(".path.")
    assert "join" not in answer["text"]


async def test_what_cannot_be_is_told_in_a_line_and_the_chat_goes_on(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    there = tmp_path / "there.txt"
    there.write_text("mine")
    typed = ["/undo", "/retry", f"/save {there}", "/save", "/stast", "/new now", "x " * 3000, "import os"]
    done = await piped(three_nodes, "\n".join(typed), "--max-new-tokens", "4")
    assert done.returncode == 1
    words = ["nothing to take back", "no message to ask again", "exists", "say where", "/stats?", "takes nothing"]
    words.append("/new begins again")
    for line, expected in zip(done.stderr.splitlines(), words, strict=True):
        assert line.startswith("swarm: ")
        assert expected in line
    assert done.stdout.strip()
    assert there.read_text() == "mine"


async def test_a_model_without_a_template_cannot_chat_and_says_so_at_once(
    three_nodes: LocalSwarm, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(resolve_model("demo"), folder)
    (folder / "chat_template.jinja").unlink()
    done = await piped(three_nodes, "hello", "--model", str(folder))
    assert done.returncode == 1
    assert "has no chat template" in done.stderr
    assert not done.stdout


async def test_a_node_that_dies_costs_an_answer_and_not_the_chat() -> None:
    async with local_swarm("demo", even_cuts(8, 2)) as swarm:
        command = chat(swarm, "--patience", "1", "--json", "--max-new-tokens", "8")
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None

        async def ask(line: str) -> dict[str, Any]:
            process.stdin.write(line.encode() + b"\n")
            return json.loads(await asyncio.wait_for(process.stdout.readline(), 60))

        assert "error" not in await ask("import os")
        tail = swarm.nodes[-1]
        tail.process.kill()
        await tail.process.wait()
        failed = await ask("x = 1")
        assert failed["error"]["message"]
        assert failed["text"] == ""
        await swarm.start("--blocks", tail.ready["blocks"], host=HostCommand(listen=tail.address))
        again = await ask("/retry")
        assert "error" not in again
        assert again["question"] == "x = 1"
        assert again["prompt_tokens"] == failed["prompt_tokens"]
        _, errors = await asyncio.wait_for(process.communicate(b""), 60)  # which closes its input
        assert process.returncode == 1
        assert len([line for line in errors.decode().splitlines() if line.startswith("swarm: ")]) >= 1
        assert b"Traceback" not in errors
