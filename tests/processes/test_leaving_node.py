"""A node that its owner stops while it has sessions says how long it waits, and leaves one line on the terminal."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
from tests.support.terminal import CTRL_C, TerminalSession, run_on_terminal

from treeswarm_client import SwarmClient

NODE = [sys.executable, "-m", "treeswarm_node.cli.main", "demo", "--listen", "127.0.0.1:0", "--registry", "none"]
NODE += ["--threads", "1", "--kv-tokens", "4096", "--grace", "600"]
ERASING = re.compile(r"\x1b\[2K|\x1b\[J")
# A signal that comes sooner is the first one again.
SAME_SIGNAL_S = 1.2


def left_on_screen(written: str) -> list[str]:
    """Return the lines that were written after the last picture was erased."""
    after = ERASING.split(written)[-1]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", after).split("\n")


async def read_until(terminal: TerminalSession, words: str) -> str:
    return await asyncio.to_thread(terminal.read_until, words)


@pytest.mark.parametrize("ends", ["by itself", "by a second Ctrl-C"])
async def test_leaving_node_keeps_its_panel_and_says_how_long_it_waits(tmp_path: Path, ends: str) -> None:
    environment = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm-256color", "COLUMNS": "120"}
    with run_on_terminal([*NODE, "--identity", tmp_path / "id.pem"], environment) as terminal:
        ready = await read_until(terminal, "clients ask with")
        (address,) = re.findall(r"ready on (127\.0\.0\.1:\d+)", ready)
        async with SwarmClient(model="demo", peers=address, draft="none", patience=0.0) as client:
            tokens = client.stream("def main(", max_new_tokens=1500, ignore_eos=True).tokens
            await anext(tokens)
            terminal.press(CTRL_C)
            shown = await read_until(terminal, "left for 1 session to move to other nodes")
            assert re.search(r"9 min \d+ s\D*$", shown.rpartition("draining")[2].partition("left")[0])
            await read_until(terminal, "Ctrl-C again: end at once")
            if ends == "by itself":
                await tokens.aclose()
                await client.__aexit__(None, None, None)
            else:
                await asyncio.sleep(SAME_SIGNAL_S)
                terminal.press(CTRL_C)
            status = await asyncio.to_thread(terminal.wait_for_exit)
            await tokens.aclose()
    assert status == (0 if ends == "by itself" else 130)
    lines = [line.strip() for line in left_on_screen(terminal.read_rest()) if line.strip()]
    expected = "swarm-node: left the swarm" if ends == "by itself" else "swarm-node: ended at once"
    assert len(lines) == 1, lines
    assert lines[0].startswith(expected)
