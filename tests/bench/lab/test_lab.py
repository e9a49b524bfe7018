"""Labs of real namespaces carry real TCP.  No upper bound on a time is asserted: the machine may be busy."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.bench.lab.conftest import TIMEOUT_S, echo, program, read_line, rtt, server

from treeswarm.errors import BadRequest, LinkBroken
from treeswarm_bench.lab import Lab, LabLink, can_make_namespaces, wan_lab
from treeswarm_bench.lab.namespaces import NAMESPACES, new_namespace, remove_leftovers

pytestmark = pytest.mark.skipif(can_make_namespaces() is not None, reason=str(can_make_namespaces()))
# Long enough for packets to arrive that are not cut; no test fails if it is too short.
STALL_S = 0.5


def namespaces() -> set[str]:
    return {path.name for path in NAMESPACES.glob(f"treeswarm-{os.getpid()}-*")}


async def test_round_trip_takes_twice_the_delay() -> None:
    async with wan_lab(["a", "b"], LabLink(delay_s=0.05)) as lab, server(lab, "b") as address:
        assert await rtt(lab, "a", address) >= 0.1


async def test_each_pair_of_hosts_has_a_link_of_its_own() -> None:
    async with wan_lab(["a", "b", "c"]) as lab, server(lab, "b") as b, server(lab, "c") as c:
        await lab.shape("a", "b", LabLink(delay_s=0.02))
        await lab.shape("a", "c", LabLink(delay_s=0.3))
        await lab.shape("b", "c", LabLink(delay_s=0.1), one_way=True)
        near, far, half = [await rtt(lab, *trip) for trip in (("a", b), ("a", c), ("b", c))]
        assert near >= 0.04
        assert far >= 0.6
        assert half >= 0.1
        assert near < far  # within one run
        with pytest.raises(BadRequest, match="no host d, only a, b, c"):
            await lab.shape("a", "d", LabLink())


async def test_slower_link_takes_longer() -> None:
    size = 256 * 1024
    async with wan_lab(["a", "b"], LabLink(rate_bps=1e6)) as lab, server(lab, "b") as address:
        slow = await echo(lab, "a", address, size)
        await lab.shape("a", "b", LabLink(rate_bps=100e6))
        fast = await echo(lab, "a", address, size)
        assert slow >= size * 8 / 1e6
        assert slow > 2 * fast


@pytest.mark.parametrize("congestion", [None, "cubic"])
async def test_tcp_survives_packet_loss(congestion: str | None) -> None:
    link = LabLink.parse("delay=2ms,jitter=1ms,rate=50mbit,loss=3%")
    async with wan_lab(["a", "b"], link, congestion=congestion) as lab, server(lab, "b") as address:
        await echo(lab, "a", address, 500_000)
        traffic = await lab.traffic()
        assert traffic["a", "b"].lost > 0
        assert traffic["a", "b"].bytes > 500_000 < traffic["b", "a"].bytes


async def send_on_cut_link(lab: Lab, dialler: asyncio.subprocess.Process, line: str) -> "asyncio.Task[str]":
    """Send a line, check that it does not come back, and return the task that still waits for it."""
    assert dialler.stdin is not None
    dialler.stdin.write(line.encode())
    before = await lab.traffic()
    waiting = asyncio.create_task(read_line(dialler))
    await asyncio.wait({waiting}, timeout=STALL_S)
    assert not waiting.done()
    assert await lab.traffic() == before  # not a packet was carried
    return waiting


async def test_cut_connection_stalls_and_resumes_when_healed() -> None:
    async with (
        wan_lab(["a", "b", "c"]) as lab,
        server(lab, "b") as address,
        program(lab, "a", "lines", address) as dialler,
        program(lab, "c", "lines", address) as other,
    ):
        for process in (dialler, other):
            assert process.stdin is not None
            process.stdin.write(b"0\n")
            assert await read_line(process) == "0\n"
        await lab.cut("a", "b")
        stalled = await send_on_cut_link(lab, dialler, "1\n")
        assert other.stdin is not None
        other.stdin.write(b"2\n")
        assert await read_line(other) == "2\n"
        await lab.heal("a", "b")
        assert await stalled == "1\n"
        await lab.cut_host("b")
        both = [await send_on_cut_link(lab, process, "3\n") for process in (dialler, other)]
        await lab.heal_host("b")
        assert await asyncio.gather(*both) == ["3\n", "3\n"]


async def test_two_labs_at_once_are_isolated() -> None:
    async with wan_lab(["a", "b"]) as first, wan_lab(["a", "b"]) as second:
        assert len(namespaces()) == 4
        async with server(first, "b") as address, server(second, "b") as same:
            assert address == same
            await first.shape("a", "b", LabLink(delay_s=0.2))
            await second.cut_host("a")
            assert await rtt(first, "a", address) >= 0.4
            assert (await second.traffic())["a", "b"].packets == 0
    assert not namespaces()


async def test_leaving_removes_namespaces_and_kills_programs() -> None:
    with pytest.raises(ZeroDivisionError):
        async with wan_lab(["a", "b"]) as lab:
            process = await asyncio.create_subprocess_exec(*lab.command("a", "sleep", "1000"))
            await lab.traffic()
            raise ZeroDivisionError
    assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == -signal.SIGKILL
    assert not namespaces()
    with pytest.raises(LinkBroken, match="hub has ended"):
        await lab.traffic()


@pytest.mark.parametrize("hosts", [["a", "a"], ["A b"], [f"h{i}" for i in range(255)], [""]], ids=range(4))
async def test_bad_host_names_leave_nothing_behind(hosts: list[str]) -> None:
    with pytest.raises(BadRequest, match="host names"):
        async with wan_lab(hosts):
            pass
    assert not namespaces()


async def test_unknown_congestion_control_leaves_nothing_behind() -> None:
    with pytest.raises(BadRequest, match="congctl nonesuch"):
        async with wan_lab(["a", "b"], congestion="nonesuch"):
            pass
    assert not namespaces()


async def program_with_a_lab(tmp_path: Path) -> tuple[asyncio.subprocess.Process, Path]:
    """Start a process, in a session of its own, that waits in a lab; return it and the prefix of its namespaces."""
    started = tmp_path / "started"
    command = ["-m", "treeswarm_bench.lab", "--hosts", "a,b", "--", "sh", "-c", f"touch {started}; exec sleep 1000"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stderr=subprocess.DEVNULL, start_new_session=True
    )
    async with asyncio.timeout(TIMEOUT_S):
        while not started.exists():
            await asyncio.sleep(0.05)
    return process, NAMESPACES / f"treeswarm-{process.pid}-"


async def test_ctrl_c_removes_all_namespaces(tmp_path: Path) -> None:
    process, prefix = await program_with_a_lab(tmp_path)
    assert len(list(NAMESPACES.glob(f"{prefix.name}*"))) == 2
    os.killpg(process.pid, signal.SIGINT)  # to all processes, as a terminal does
    assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 130
    assert not list(NAMESPACES.glob(f"{prefix.name}*"))


async def test_hub_removes_the_namespaces_of_a_killed_lab(tmp_path: Path) -> None:
    process, prefix = await program_with_a_lab(tmp_path)
    process.kill()
    async with asyncio.timeout(TIMEOUT_S):
        while list(NAMESPACES.glob(f"{prefix.name}*")):
            await asyncio.sleep(0.05)
    await process.wait()


async def test_next_lab_removes_leftovers_of_a_killed_lab_and_hub(tmp_path: Path) -> None:
    process, prefix = await program_with_a_lab(tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    assert len(list(NAMESPACES.glob(f"{prefix.name}*"))) == 2
    with new_namespace("own") as own:
        remove_leftovers()
        assert not list(NAMESPACES.glob(f"{prefix.name}*"))
        assert own in namespaces()
