"""Real programs whose clocks are wrong, on two nodes that the tests share: both sides are told, and `--peers` works."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import tests.support.shifted_clock

from treeswarm.protocol.spans import Span
from treeswarm_client.local_swarm import HostCommand, LocalSwarm, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
HOUR, DAY = 3600, 86400
SHIFTED = Path(tests.support.shifted_clock.__path__[0])
PROMPT = "def read(self"


def shifted_environment(offset: Path) -> dict[str, str]:
    """Return the variables with which a program adds to its clock the seconds that a file holds."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SHIFTED), os.environ.get("PYTHONPATH")))),
        "SHIFTED_CLOCK": str(offset),
    }


@dataclass(frozen=True)
class ClockSwarm:
    """Two nodes, and the file that sets the second one's clock."""

    swarm: LocalSwarm
    second_clock: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clocks(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ClockSwarm]:
    second = tmp_path_factory.mktemp("clock") / "second"
    second.write_text("0")
    shifted = HostCommand(through=("env", *(f"{k}={v}" for k, v in shifted_environment(second).items())))
    async with local_swarm("demo", [Span(0, 4), Span(4, 8)], hosts=[HostCommand(), shifted]) as swarm:
        yield ClockSwarm(swarm, second)


async def generate(peers: str, offset: Path) -> tuple[str, str]:
    """Generate with a real client whose clock is shifted; return its output and its notes."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "treeswarm_client.cli.main", "generate", PROMPT, "--model", "demo", "--draft", "none"),
        *("--max-new-tokens", "4", "--peers", peers),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | shifted_environment(offset),
    )
    output, notes = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, notes.decode()
    return output.decode(), notes.decode()


async def test_named_nodes_are_used_whatever_the_clock(clocks: ClockSwarm, tmp_path: Path) -> None:
    offset, texts = tmp_path / "offset", []
    for seconds, words in ((0, ""), (HOUR, "1 h ahead of"), (-2 * DAY, "2 d behind")):
        offset.write_text(str(seconds))
        text, notes = await generate(clocks.swarm.peers, offset)
        texts.append(text)
        warning = f"this machine's clock is {words} those of 2 nodes; their records are judged by their own clocks"
        assert (warning in notes) if words else ("clock" not in notes)
    assert texts[0] == texts[1] == texts[2]


async def test_clock_of_a_node_stepped_while_it_runs_is_told_on_both_sides(clocks: ClockSwarm, tmp_path: Path) -> None:
    """This test is the last one: it stops the nodes to read what they logged."""
    offset = tmp_path / "offset"
    offset.write_text(str(HOUR))
    await generate(clocks.swarm.peers, offset)
    offset.write_text("0")
    clocks.second_clock.write_text(str(-2 * DAY))
    first, second = clocks.swarm.nodes
    _, notes = await generate(clocks.swarm.peers, offset)
    assert "clock" not in notes  # one of two nodes is no majority, and its record is judged by its own clock
    second.process.terminate()
    logged = (await second.errors).decode()
    assert "this machine's clock was set back by 2 d while the node ran" in logged
    assert "this machine's clock is 2 d behind that of 127.0.0.1, and one of the two is wrong" in logged
    first.process.terminate()
    # Of the first client, whose clock is an hour ahead.
    assert (
        "this machine's clock is 1 h behind that of 127.0.0.1, and one of the two is wrong"
        in (await first.errors).decode()
    )
