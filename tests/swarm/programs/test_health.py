"""Findings: each that is not ok has a next step; clocks are judged by the median of others."""

import io
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from treeswarm.errors import Malformed, Unreachable
from treeswarm.programs.health import RENEWED_S, Finding, Verdict, clock, failed, open_files, python_version
from treeswarm.programs.health_of_swarm import examine_swarm
from treeswarm.programs.health_text import show
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.transport.memory import MemoryNetwork


@pytest.mark.parametrize(
    ("ages", "rejected", "verdict", "said"),
    [
        ([0.2, 30, 70], {}, Verdict.OK, "agrees with 3 others"),
        ([0.2, 30, 5000], {}, Verdict.OK, "agrees"),
        ([-20, -30, 10], {}, Verdict.WARN, "at least 20 s late"),
        ([-70, -80], {}, Verdict.FAIL, "at least 75 s late"),
        ([100, 110], {}, Verdict.WARN, "at least 30 s ahead"),
        ([200, 210, 1], {}, Verdict.FAIL, "at least 125 s ahead"),
        ([], {}, Verdict.WARN, "not compared"),
        ([], {"from-the-future": 2}, Verdict.FAIL, "2 records are of the future"),
        ([], {"expired": 3, "forged": 9}, Verdict.FAIL, "probably minutes ahead"),
        ([1, 2], {"expired": 1}, Verdict.OK, "agrees"),
    ],
)
def test_a_clock_by_others_records(ages: list[float], rejected: dict[str, int], verdict: Verdict, said: str) -> None:
    found = clock(ages, rejected)
    assert (found.verdict, said in found.said) == (verdict, True), found
    assert bool(found.next) == (verdict is not Verdict.OK)


@given(offset=st.floats(-500, 500), delays=st.lists(st.floats(0, RENEWED_S), min_size=1, max_size=20))
def test_a_clock_that_is_right_is_never_blamed_and_one_far_off_always(offset: float, delays: list[float]) -> None:
    found = clock([delay + offset for delay in delays], Counter())
    if abs(offset) < 5:
        assert found.verdict is Verdict.OK
    if abs(offset) > RENEWED_S + 60:
        assert found.verdict is Verdict.FAIL
        assert ("late" if offset < 0 else "ahead") in found.said


def test_an_errors_ending_is_the_next_step() -> None:
    found = Finding.of_error("registry", Unreachable("nobody answers at h:1 (refused): check the address"))
    assert (found.said, found.next) == ("nobody answers at h:1 (refused)", "check the address")
    assert Finding.of_error("registry", Malformed("no colon")).next
    assert failed([found])


def test_this_machine() -> None:
    assert python_version().verdict is Verdict.OK
    few, many = open_files(1), open_files(10**9)
    assert few is not None
    assert few.verdict is Verdict.OK
    assert many is None or many.verdict is Verdict.OK or many.next


def test_findings_are_shown_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding.ok("python", "3.12"), Finding.warn("disk", "[bold]4 GB", "make room")]
    console = Console(file=io.StringIO(), width=80)
    assert show(console, findings, as_json=False) == 0
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert lines == ["ok python 3.12", "warn disk [bold]4 GB", "→ make room"]
    assert show(console, [*findings, Finding.fail("port", "taken", "give another")], as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["findings"][2] == {"check": "port", "verdict": "fail", "said": "taken", "next": "give another"}


async def test_a_registry_without_nodes_is_a_warning() -> None:
    async def opening() -> MemoryRegistry:
        return MemoryRegistry("0" * 64)

    seen = await examine_swarm(opening, MemoryNetwork().transport(), first_s=0.01)
    assert [(f.check, f.verdict.value) for f in seen.findings] == [("registry", "warn"), ("clock", "warn")]
    assert seen.answering == ()
