"""Tests of the health checks: every finding that is not OK has a next step, and clocks are judged by the median."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from treeswarm.errors import Malformed, Unreachable
from treeswarm.programs.health import (
    Finding,
    Verdict,
    any_failed,
    check_clock,
    check_open_files,
    check_python_version,
)
from treeswarm.programs.health_report import print_findings
from treeswarm.programs.swarm_health import examine_swarm
from treeswarm.registry.clocks import ClockSample
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.transport.memory import MemoryNetwork


@pytest.mark.parametrize(
    ("ahead", "verdict", "message"),
    [
        ([0.2, 3.0, -4.0], Verdict.OK, "agrees with 3 other nodes"),
        ([0.2, 3.0, 5000.0], Verdict.OK, "agrees with 3 other nodes"),
        (
            [20.0, 30.0, 10.0],
            Verdict.WARN,
            "this machine's clock is 20 s behind those of 3 nodes, which does no harm yet",
        ),
        ([-3600.0, -3601.0], Verdict.FAIL, "this machine's clock is 1 h ahead of those of 2 nodes"),
        ([172800.0], Verdict.WARN, "this machine's clock is 2 d behind that of n0, and one of the two is wrong"),
        ([], Verdict.WARN, "not compared: no node said what time it has"),
    ],
)  # fmt: skip
def test_clock_is_judged_by_those_of_other_nodes(ahead: list[float], verdict: Verdict, message: str) -> None:
    finding = check_clock([ClockSample(f"n{i}", seconds) for i, seconds in enumerate(ahead)])
    assert (finding.verdict, finding.message) == (verdict, message)
    assert bool(finding.next_step) == (verdict is not Verdict.OK)


@given(offset=st.floats(-500, 500), delays=st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_clock_check_accepts_right_clocks_and_rejects_wrong_ones(offset: float, delays: list[float]) -> None:
    finding = check_clock([ClockSample(f"n{i}", -delay - offset) for i, delay in enumerate(delays)])
    if abs(offset) < 3:
        assert finding.verdict is Verdict.OK
    if abs(offset) > 62:
        assert finding.verdict is Verdict.FAIL
        assert ("behind" if offset < 0 else "ahead") in finding.message


def test_end_of_an_error_message_becomes_the_next_step() -> None:
    finding = Finding.of_error("registry", Unreachable("no answer from h:1 (refused): check the address"))
    assert (finding.message, finding.next_step) == ("no answer from h:1 (refused)", "check the address")
    assert Finding.of_error("registry", Malformed("no colon")).next_step
    assert any_failed([finding])


def test_python_and_open_file_checks_pass_on_this_machine() -> None:
    assert check_python_version().verdict is Verdict.OK
    few, many = check_open_files(1), check_open_files(10**9)
    assert few is not None
    assert few.verdict is Verdict.OK
    assert many is None or many.verdict is Verdict.OK or many.next_step


def test_findings_are_printed_as_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding.ok("python", "3.12"), Finding.warn("disk", "[bold]4 GB", "make room")]
    console = Console(file=io.StringIO(), width=80)
    assert print_findings(console, findings, as_json=False) == 0
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert lines == ["ok python 3.12", "warn disk [bold]4 GB", "→ make room"]
    assert print_findings(console, [*findings, Finding.fail("port", "taken", "give another")], as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["findings"][2] == {"check": "port", "verdict": "fail", "said": "taken", "next": "give another"}


async def test_registry_without_nodes_is_a_warning() -> None:
    async def opener() -> MemoryRegistry:
        return MemoryRegistry("0" * 64)

    report = await examine_swarm(opener, MemoryNetwork().transport(), first_s=0.01)
    assert [(f.check, f.verdict.value) for f in report.findings] == [("registry", "warn"), ("clock", "warn")]
    assert report.answering == ()
