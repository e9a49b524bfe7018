"""`swarm chat` with real nodes, on a pseudo-terminal and through pipes."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.terminal import CTRL_C, CTRL_D, TAB, run_on_terminal

from treeswarm.model_files import resolve_model
from treeswarm_client import SwarmClient
from treeswarm_client.local_swarm import HostCommand, LocalSwarm, even_cuts, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")

BIN = Path(sys.executable).parent
# Longer than a unit of the prefix cache.
LONG = "def copy(source, target, follow=True, times=None): " * 8


def chat_command(swarm: LocalSwarm, *flags: str) -> list[str | Path]:
    return [BIN / "swarm", "chat", "--model", "demo", "--peers", swarm.peers, "--draft", "ngram", *flags]


async def run_piped(swarm: LocalSwarm, typed: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = chat_command(swarm, *flags)
    return await asyncio.to_thread(
        subprocess.run, command, input=typed, capture_output=True, text=True, timeout=120, check=False
    )


async def read_answers(swarm: LocalSwarm, typed: str, *flags: str) -> list[dict[str, Any]]:
    result = await run_piped(swarm, typed, "--json", *flags)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


async def test_ctrl_c_stops_the_answer_but_not_the_chat_command(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    state, saved = tmp_path / "state", tmp_path / "saved.json"
    await asyncio.to_thread(_chat_on_terminal, three_nodes, state, saved)
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "# careful"
    assert messages[1]["content"] == "import os\nimport sys"
    assert messages[3]["content"] == "/not a command\n  \\"
    # A stopped answer is a prefix of the answer that the model would have given.
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="ngram") as client:
        for question, answer in ((messages[:2], messages[2]), (messages[:4], messages[4])):
            whole = await client.generate(client.encode_chat(question), max_new_tokens=600)
            assert 0 < len(answer["content"]) < len(whole.text)
            assert whole.text.startswith(answer["content"])
    history = state / "treeswarm" / "chat_history"
    assert {"import sys", "/stats"} <= set(history.read_text().split("\n"))
    assert history.stat().st_mode & 0o777 == 0o600


def _chat_on_terminal(swarm: LocalSwarm, state: Path, saved: Path) -> None:
    # One token per round trip over slow links: the answer takes a minute, so that Ctrl-C surely comes before its end.
    command = chat_command(swarm, "--tree-size", "0", "--max-new-tokens", "1500", "--emulate-link", "delay=25ms")
    with run_on_terminal([*command, "--system", "# careful"], {"XDG_STATE_HOME": str(state)}) as terminal:
        terminal.read_until("Ctrl-D leaves")
        terminal.read_until("> ")
        terminal.type_line("import os\\")
        terminal.read_until(". ")
        terminal.type_line("import sys")
        terminal.read_until("import sys\r\n")
        terminal.read_some()
        terminal.press(CTRL_C)
        terminal.read_until("/retry asks again")
        terminal.read_until("> ")
        for line in ('"""', "/not a command", "  \\"):
            terminal.type_line(line)
            terminal.read_until("\n. ")
        terminal.type_line('"""')
        terminal.read_until('"""\r\n')
        terminal.read_some()
        terminal.press(CTRL_C)
        terminal.read_until("/retry asks again")
        terminal.read_until("> ")
        terminal.press(b"half a word")
        terminal.read_until("half a word")
        terminal.press_until(CTRL_C, "Ctrl-D or /quit leaves")
        terminal.read_until("> ")
        terminal.press(b"/st" + TAB + b"\r")
        assert "2 answers" in terminal.read_until("of which nodes had")
        terminal.read_until("> ")
        terminal.type_line(f"/save {saved}")
        terminal.read_until("5 messages are in")
        terminal.read_until("> ")
        terminal.press(CTRL_D)
        assert terminal.wait_for_exit() == 0


async def test_ctrl_d_during_an_answer_leaves_after_it(three_nodes: LocalSwarm) -> None:
    def type_ctrl_d() -> None:
        command = chat_command(
            three_nodes, "--tree-size", "0", "--max-new-tokens", "60", "--emulate-link", "delay=25ms"
        )
        with run_on_terminal([*command, "--no-history"], {}) as terminal:
            terminal.read_until("> ")
            terminal.type_line("import os")
            terminal.read_until("import os\r\n")
            terminal.read_some()
            terminal.press(CTRL_D)
            terminal.read_until("ended at 60 tokens")
            assert terminal.wait_for_exit() == 0

    await asyncio.to_thread(type_ctrl_d)


async def test_colours_flag_is_honoured_unless_no_color_is_set(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    def show(*flags: str, **environment: str) -> str:
        environment |= {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)}
        with run_on_terminal(
            chat_command(three_nodes, "--max-new-tokens", "8", "--no-history", *flags), environment
        ) as terminal:
            terminal.read_until("finding nodes")
            terminal.read_until("> ")
            terminal.type_line("import os")
            output = terminal.read_until("--max-new-tokens N")
            terminal.type_line("/quit")
            assert terminal.wait_for_exit() == 0
        return output

    coloured = await asyncio.to_thread(show, "--colours")
    assert "\x1b[35m" in coloured  # the colour of the second traversal
    assert "\x1b[35m" not in await asyncio.to_thread(show)
    assert "\x1b[35m" not in await asyncio.to_thread(lambda: show("--colours", NO_COLOR="1"))
    assert not await asyncio.to_thread(lambda: list(tmp_path.iterdir()))  # --no-history


async def test_second_turn_reuses_the_prefix_of_the_first(three_nodes: LocalSwarm) -> None:
    first, second = await read_answers(three_nodes, f"{LONG}\nand now\n", "--max-new-tokens", "16")
    assert first["question"] == LONG
    assert first["prefix_tokens"] == 0
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert second["prefix_tokens"] >= first["prompt_tokens"] // 64 * 64 > 0
    assert first["finish_reason"] == "length"


async def test_piped_lines_are_messages_with_printed_answers(three_nodes: LocalSwarm) -> None:
    typed = "import os\n\nx = 1\\\ny = 2"
    answers = await read_answers(three_nodes, typed, "--max-new-tokens", "12")
    assert [answer["question"] for answer in answers] == ["import os", "x = 1\ny = 2"]
    result = await run_piped(three_nodes, typed, "--max-new-tokens", "12")
    assert (result.returncode, result.stderr) == (0, "")
    texts = [answer["text"] for answer in answers]
    assert result.stdout == "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)


async def test_chat_commands_change_the_conversation(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    typed = ["import os", "/retry", "/undo", "import os", "/system # strictly", "x = 1", "/new", "import os"]
    flags = ("--max-new-tokens", "12", "--temperature", "1", "--seed", "3")
    first, retried, undone, strict, new = await read_answers(three_nodes, "\n".join(typed), *flags)
    assert retried["prompt_tokens"] == undone["prompt_tokens"] == first["prompt_tokens"]
    assert retried["text"] != first["text"]  # another sample
    assert undone["text"] == first["text"]  # as if the attempt in between had not happened
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="ngram") as client:
        system = {"role": "system", "content": "# strictly"}
        talk = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": undone["text"]}]
        talk.append({"role": "user", "content": "x = 1"})
        assert strict["prompt_tokens"] == len(client.encode_chat([system, *talk]))
        assert new["prompt_tokens"] == len(client.encode_chat([system, talk[0]]))


async def test_answer_ends_at_a_stop_text(three_nodes: LocalSwarm) -> None:
    (answer,) = await read_answers(three_nodes, "import os", "--stop", "join")
    assert answer["finish_reason"] == "stop"
    assert answer["text"].startswith(".path.")
    assert "join" not in answer["text"]


async def test_failed_command_prints_one_line_and_the_chat_continues(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    existing = tmp_path / "there.txt"
    existing.write_text("mine")
    typed = ["/undo", "/retry", f"/save {existing}", "/save", "/stast", "/new now", "x " * 3000, "import os"]
    result = await run_piped(three_nodes, "\n".join(typed), "--max-new-tokens", "4")
    assert result.returncode == 1
    words = ["no message to take back", "no message to ask again", "exists", "no file is given", "/stats?"]
    words += ["takes no argument", "/new begins again"]
    for line, expected in zip(result.stderr.splitlines(), words, strict=True):
        assert line.startswith("swarm: ")
        assert expected in line
    assert result.stdout.strip()
    assert existing.read_text() == "mine"


async def test_model_without_a_chat_template_is_refused_at_once(three_nodes: LocalSwarm, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(resolve_model("demo"), folder)
    (folder / "chat_template.jinja").unlink()
    result = await run_piped(three_nodes, "hello", "--model", str(folder))
    assert result.returncode == 1
    assert "has no chat template" in result.stderr
    assert not result.stdout


async def test_lost_node_fails_one_answer_but_not_the_chat() -> None:
    async with local_swarm("demo", even_cuts(8, 2)) as swarm:
        command = chat_command(swarm, "--patience", "1", "--json", "--max-new-tokens", "8")
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
