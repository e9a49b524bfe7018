"""The planner against injected faults of speed, on a virtual clock: `swarm bench disturbed`, a cheap part of it."""

import argparse
import json

import pytest

from treeswarm.errors import BadRequest
from treeswarm_bench import cli
from treeswarm_bench.benchmarks.disturbed import judge as judge_module
from treeswarm_bench.benchmarks.disturbed.bench import result_of, table_of
from treeswarm_bench.benchmarks.disturbed.judge import CaseVerdict, FixedSizes, judge
from treeswarm_bench.benchmarks.disturbed.play import play
from treeswarm_bench.benchmarks.disturbed.text import scripted_text
from treeswarm_bench.benchmarks.disturbed.world import Script

FIXED = FixedSizes(sizes=(0, 16))
FIXED_NEAR = FixedSizes(sizes=(0, 4))


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_command(parser.add_subparsers())
    args = parser.parse_args(["bench", "disturbed", *arguments])
    return int(args.run(args))


def test_same_seed_plays_the_same_rounds() -> None:
    played = [play(Script(0.025, noisy=True), scripted_text("good", 1), "auto", tokens=48, seed=1) for _ in range(2)]
    assert played[0].rounds == played[1].rounds
    other = play(Script(0.025, noisy=True), scripted_text("good", 1), "auto", tokens=48, seed=2)
    assert other.rounds != played[0].rounds


def test_trees_pay_on_a_good_text_and_never_on_a_poor_one() -> None:
    def rate(text: str, size: int) -> float:
        played = play(Script(0.025), scripted_text(text, 0), size, tokens=96)
        return played.tokens / played.seconds

    assert rate("good", 16) > 4 * rate("good", 0)
    assert rate("poor", 1) < rate("poor", 0) == pytest.approx(rate("good", 0))


def test_plain_decoding_judges_itself_as_plain_and_far_from_best() -> None:
    verdict = judge("none", "25ms", "good", seeds=[0], fixed=FIXED, size=0, lengths=(32, 64))
    assert verdict.over_plain == {32: 1.0, 64: 1.0}
    assert (verdict.broken, verdict.longest_wrong_no) == (["best", "no"], 64)
    assert verdict.least_of_best < 0.3


def test_bench_prints_one_object_and_fails_on_broken_bounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge_module, "FIXED_SIZES", (0, 16))
    code = run("--cells", "25ms", "--cases", "none", "--texts", "good", "--prompts", "1", "--json")
    result = json.loads(capsys.readouterr().out)
    assert (code == 0) == result["well"] == (not any(case["broken"] for case in result["cases"]))
    assert [case["fault"] for case in result["cases"]] == ["none"]
    assert {"date", "machine", "versions"} <= result["provenance"].keys()


@pytest.mark.parametrize(
    "fault",
    [
        "first draft 50x",
        "first draft 400x",
        "crowded start",
        "burst 1 s, client",
        "burst 5 s, all",
        "shared cores",
        "link jumps to 150 ms",
        "node replaced, 5x",
        "cold nodes 5x",
    ],
)
def test_planner_holds_its_bounds_on_a_good_text_at_25_ms(fault: str) -> None:
    verdict = judge(fault, "25ms", "good", seeds=[0], fixed=FIXED, lengths=(32, 64, 128))
    assert verdict.phases
    assert verdict.broken == [], verdict.as_dict()


@pytest.mark.parametrize("fault", ["none", "first draft 50x", "first draft 400x"])
def test_planner_holds_its_bounds_on_a_poor_text_at_25_ms(fault: str) -> None:
    verdict = judge(fault, "25ms", "poor", seeds=[0], fixed=FIXED, lengths=(32, 64))
    assert verdict.phases
    assert verdict.broken == [], verdict.as_dict()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("none", "good"),
        ("loaded first 5 s, client", "good"),
        ("none", "poor"),
        ("burst 5 s, all", "poor"),
        ("loaded first 5 s, one node", "changing"),
    ],
)
def test_planner_holds_its_bounds_at_1_ms(fault: str, text: str) -> None:
    """Nodes and client have cores of their own, so that drafting beside a round takes no time from it."""
    verdict = judge(fault, "1ms", text, seeds=[0], fixed=FIXED_NEAR, lengths=(32, 64, 128))
    assert verdict.phases
    assert verdict.broken == [], verdict.as_dict()


@pytest.mark.parametrize("link", ["1ms", "25ms"])
def test_planner_holds_its_bounds_on_a_poor_text_on_shared_cores(link: str) -> None:
    """A draft beside a node takes its time, so that learning is never free."""
    verdict = judge("shared cores", link, "poor", seeds=[0], fixed=FIXED_NEAR, lengths=(32, 64))
    assert verdict.phases
    assert verdict.broken == [], verdict.as_dict()


def test_worst_cases_come_first() -> None:
    def verdict(fault: str, over_plain: float) -> CaseVerdict:
        return CaseVerdict(fault, "25ms", "good", {32: over_plain}, ())

    result = result_of([verdict("calm", 4.0), verdict("bad", 0.5)], seeds=[0], minutes=1.0)
    assert [case["fault"] for case in result["cases"]] == ["bad", "calm"]
    assert (result["well"], result["broken"]["plain"]) == (False, 1)
    table = table_of(result)
    assert table.row_count == 2
    assert str(table.title).startswith("2 cases: 1 under 0.95 of plain, 0 under 0.9")


def test_unknown_case_is_refused() -> None:
    with pytest.raises(BadRequest, match="unknown case 'earthquake'"):
        run("--cases", "earthquake")
