"""`swarm bench wan`: statistics, goals, texts, strategies that exist for it alone, command line and pictures."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.errors import BadRequest
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.walk import walk
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.texts import QUESTIONS
from treeswarm_bench.benchmarks.wan.cells import CELLS, Cell
from treeswarm_bench.benchmarks.wan.corpora import (
    STARTED,
    TextSource,
    make_corpora,
    prose_passages,
    shared_tokens,
    write_twice,
)
from treeswarm_bench.benchmarks.wan.draw import draw
from treeswarm_bench.benchmarks.wan.goals import FIXED, MatrixCase, SamplesByCase, check_goals
from treeswarm_bench.benchmarks.wan.matrix import MatrixPlan, MatrixProgress
from treeswarm_bench.benchmarks.wan.statistics import (
    Sample,
    least_of,
    mean_of,
    miss_share,
    paired,
    rate,
    same_text,
    summary,
)
from treeswarm_bench.benchmarks.wan.strategies import STRATEGIES, MisledDrafter, walk_without_bonus
from treeswarm_bench.cli import add_command
from treeswarm_client.drafters.seam import NO_TREE, DraftTree, Verification

RING_S = {"25ms": 0.1, "100ms": 0.4}


def sample(tokens: int, seconds: float, rounds: int = 1) -> Sample:
    return Sample(tokens, seconds, rounds, 8 * rounds, 0.5, 0.5, 0.1, 0.2, 0.0, 0.1)


samples = st.builds(sample, st.integers(1, 100), st.floats(0.01, 100.0), st.integers(1, 100))
pairs = st.lists(st.tuples(samples, samples), min_size=1, max_size=6)


# ---------------------------------------------------------------- statistics


@given(pairs)
def test_ratio_is_that_of_the_rates_over_all_prompts(sampled: list[tuple[Sample, Sample]]) -> None:
    over, under = zip(*sampled, strict=True)
    assert paired(over, under).value == pytest.approx(rate(over) / rate(under))
    assert paired(over, under).value == pytest.approx(1.0 / paired(under, over).value)


@given(st.lists(samples, min_size=2, max_size=6), st.floats(0.1, 10.0))
def test_common_differences_leave_the_ratio_certain(slow: list[Sample], times: float) -> None:
    """However much prompts differ, one strategy is `times` as fast on each: pairing keeps the interval narrow."""
    fast = [sample(s.tokens, s.seconds / times) for s in slow]
    ratio = paired(fast, slow).as_dict()
    assert [ratio["value"], ratio["low"], ratio["high"]] == pytest.approx([times] * 3)


def test_one_prompt_has_no_interval() -> None:
    assert paired([sample(8, 1.0)], [sample(4, 1.0)]).as_dict() == {"value": 2.0, "low": None, "high": None}


def test_interval_is_as_wide_as_prompts_differ() -> None:
    ratio = paired([sample(10, 1.0), sample(30, 1.0)], [sample(10, 1.0), sample(10, 1.0)]).as_dict()
    assert (ratio["low"], ratio["value"], ratio["high"]) == (1.0, 2.0, 3.0)


@given(pairs, pairs)
def test_mean_lies_between_its_ratios(first: list[tuple[Sample, Sample]], second: list[tuple[Sample, Sample]]) -> None:
    ratios = [paired(*zip(*sampled, strict=True)) for sampled in (first, second)]
    low, high = sorted(ratio.value for ratio in ratios)
    assert low * (1 - 1e-9) <= mean_of(ratios).value <= high * (1 + 1e-9)
    assert least_of(ratios).value == low


def test_plain_decoding_without_computing_has_miss_share_one() -> None:
    assert miss_share([sample(10, 1.0, rounds=10), sample(5, 0.5, rounds=5)], 0.1) == pytest.approx(1.0)


def test_summary_shows_where_the_time_went() -> None:
    figures = summary([sample(10, 1.5, rounds=5)], 0.1)
    assert figures["tokens_per_traversal"] == 2.0
    assert figures["nodes_per_traversal"] == 8.0
    assert figures["tokens_per_prompt"] == 11
    assert figures["time_share"] == pytest.approx({"draft": 0.05, "wire": 0.1, "queue": 0.0, "compute": 0.05})
    json.dumps(figures)


def test_shorter_text_may_be_the_beginning_of_the_longer() -> None:
    assert same_text({"plain": [1, 2], "auto": [1, 2, 3], "tree": [1, 2, 3]})
    assert not same_text({"plain": [1, 9], "auto": [1, 2, 3]})


# ---------------------------------------------------------------- goals


def two_prompts(rates: dict[str, float]) -> dict[str, list[Sample]]:
    """Return samples of two prompts with a hundred tokens each, five per round, by strategy."""
    return {name: [sample(100, 100 / tokens_per_second, 20)] * 2 for name, tokens_per_second in rates.items()}


def test_goals_are_checked_with_what_was_measured() -> None:
    measured: SamplesByCase = {
        MatrixCase("25ms", "code", 0.0): two_prompts(
            {"auto": 48.0, "auto-sync": 40.0, "plain": 8.0, "star": 6.0, "tree-64": 50.0}
        ),
        MatrixCase("25ms", "code", 1.0): two_prompts({"auto": 24.0, "plain": 8.0}),
    }
    verdicts = check_goals(measured, RING_S)
    by_name = {check["name"]: check for check in verdicts["checks"]}
    best = by_name["auto / best fixed setting, least of all places"]
    assert best["value"] == pytest.approx(0.96)
    assert best["met"]
    assert best["per"]["25ms, code, T=1"] == pytest.approx(3.0)
    assert by_name["auto / plain, 25ms, code, greedy"]["value"] == pytest.approx(6.0)
    assert by_name["auto / star, 25ms, code, greedy"]["met"]
    sampled = by_name["auto at T=1 / greedy, code, mean of all cells"]
    assert (sampled["value"], sampled["met"]) == (pytest.approx(0.5), False)
    bound = by_name["misses × ring latency / time of auto, 25ms, code, greedy"]
    assert (bound["value"], bound["met"]) == (pytest.approx(20 * 0.1 / (100 / 48)), True)
    assert by_name["auto / auto-sync, mean of all places"]["value"] == pytest.approx(1.2)
    assert "auto / chain-8, mean of all places" in verdicts["not_measured"]
    json.dumps(verdicts)


def test_goals_that_were_not_measured_are_named() -> None:
    verdicts = check_goals({}, {})
    assert verdicts["checks"] == []
    assert len(verdicts["not_measured"]) == len(set(verdicts["not_measured"])) > len(FIXED)


def test_every_fixed_setting_is_a_strategy() -> None:
    by_name = {strategy.name: strategy for strategy in STRATEGIES}
    assert {*FIXED, "auto", "auto-sync", "star"} <= by_name.keys()
    ring, star = by_name["chain-10-no-bonus"], by_name["star-chain-10-no-bonus"]
    assert star == replace(ring, name=star.name, description=star.description, policy=star.policy, star=True)


# ---------------------------------------------------------------- what is measured


def test_cells_have_the_delays_and_flags_of_their_names() -> None:
    by_name = {cell.name: cell for cell in CELLS}
    assert by_name["25ms"].ring_s(3) == pytest.approx(0.1)
    assert by_name["25ms"].star_s(3) == pytest.approx(0.15)
    assert by_name["25ms"].node_flags(3) == [(), (), ()]
    assert by_name["slow-node"].node_flags(3) == [(), ("--device-share", "0.25"), ()]


def test_plain_is_always_among_the_strategies() -> None:
    plan = MatrixPlan.of(["1ms"], ["prose"], [1.0], ["auto", "star", "auto"])
    assert [strategy.name for strategy in plan.strategies] == ["plain", "auto", "star"]
    assert [strategy.name for strategy in plan.strategies_for("prose", 1.0)] == ["plain", "auto"]
    assert [strategy.name for strategy in plan.strategies_for("code", 0.0)] == ["plain", "auto", "star"]


@pytest.mark.parametrize("wrong", [{"cells": ["2ms"]}, {"texts": ["verse"]}, {"strategies": ["oracle"]}])
def test_unknown_name_is_refused_with_the_known_ones(wrong: dict[str, list[str]]) -> None:
    with pytest.raises(BadRequest, match="choose from"):
        MatrixPlan.of(**wrong)  # type: ignore[arg-type]


def test_progress_ends_at_all_done() -> None:
    lines: list[str] = []
    plan = MatrixPlan.of(["1ms", "100ms"], ["code", "zero"], [0.0, 1.0])
    progress = MatrixProgress(plan, BenchSetup(), lines.append)
    for cell in plan.cells:
        for text in plan.texts:
            for temperature in plan.temperatures:
                progress.finish(MatrixCase(cell.name, text, temperature))
    assert len(lines) == 8
    assert lines[-1].startswith("100%")
    assert "0.0 left" in lines[-1]


def test_copying_text_is_the_same_twice() -> None:
    start, more = [1, 2, 3], list(range(10, 30))
    text = write_twice(start, more)
    assert text == [*start, *more, *start, *more[:STARTED]]
    assert shared_tokens(more, [*more[:5], 99]) == 5
    assert shared_tokens([], more) == 0


class SpellingClient:
    """A client whose chat template is one token before the characters of the question."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return [0, *(ord(character) for message in messages for character in message["content"])]


async def test_chat_text_is_questions_in_the_template_of_the_model() -> None:
    """The bundled target has no chat template, so these texts are measured only where they are asked for."""
    source = TextSource(SpellingClient(), Path("model"), "float32", 3)  # type: ignore[arg-type]
    [corpus] = await make_corpora(source, ["chat"])
    assert corpus.prompts == [[0, *map(ord, question)] for question in QUESTIONS[:3]]
    assert MatrixPlan.of(texts=["chat"]).texts == ["chat"]
    assert "chat" not in MatrixPlan.of().texts


def test_prose_has_at_least_six_long_passages() -> None:
    assert len(prose_passages()) >= 6
    assert all(len(passage) > 400 and "\n" not in passage for passage in prose_passages())


# ---------------------------------------------------------------- strategies


def chain(tokens: Sequence[int]) -> DraftTree:
    count = len(tokens)
    return DraftTree(np.arange(-1, count - 1), np.array(tokens, np.int64), -np.arange(count, dtype=np.float32))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10), st.data())
def test_walk_without_bonus_keeps_its_hits_or_one_token(tokens: list[int], data: st.DataObject) -> None:
    answers = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(tokens) + 1, max_size=len(tokens) + 1)))
    draft = chain(tokens)
    whole = walk(draft.parents, draft.tokens, answers)
    shortened = walk_without_bonus(draft, whole)
    kept = [*(tokens[node] for node in shortened.accepted), shortened.bonus]
    assert len(kept) == max(1, len(whole.accepted))
    assert kept == answers[: len(kept)].tolist()


class RecordingDrafter:
    """A drafter that proposes one tree, and records what it observes."""

    name = "recording"
    alternatives = 3

    def __init__(self) -> None:
        self.begun: list[Sequence[int]] = []
        self.observed: list[Verification] = []

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        self.begun.append(prompt)

    def propose(self, size: int, depth: int, should_stop: object = None) -> DraftTree:
        return DraftTree(np.array([-1, -1, 0]), np.array([3, 7, 5]), np.array([-0.1, -0.2, -0.3], np.float32))

    def observe(self, verification: Verification) -> None:
        self.observed.append(verification)


def test_misled_drafter_proposes_the_same_tree_of_other_tokens() -> None:
    inner = RecordingDrafter()
    misled = MisledDrafter(inner, 10)
    misled.begin([1, 2], SamplingSettings())
    tree, plain = misled.propose(3, 3), inner.propose(3, 3)
    assert tree.tokens.tolist() == [8, 2, 0]
    assert tree.parents.tolist() == plain.parents.tolist()
    assert tree.scores.tolist() == plain.scores.tolist()
    verification = Verification(NO_TREE, np.array([4]), (), 4)
    misled.observe(verification)
    assert (inner.begun, inner.observed) == ([[1, 2]], [verification])
    assert (misled.name, misled.alternatives) == ("recording, misled", 3)


# ---------------------------------------------------------------- command line and pictures


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    return parser.parse_args(["bench", *words])


def test_flags_choose_parts_of_the_matrix() -> None:
    args = parse("wan", "--cells", "1ms,25ms", "--texts", "code", "--temperatures", "0,1", "--strategies", "plain,auto")
    plan = MatrixPlan.of(args.cells, args.texts, args.temperatures, args.strategies)
    assert [cell.name for cell in plan.cells] == ["1ms", "25ms"]
    assert (plan.texts, plan.temperatures) == (["code"], [0.0, 1.0])
    everything = parse("wan")
    plan = MatrixPlan.of(everything.cells, everything.texts, everything.temperatures, everything.strategies)
    assert len(plan.cells) * len(plan.texts) * len(plan.temperatures) == 40


def draw_rows(folder: Path, rows: list[dict[str, object]]) -> list[Path]:
    source = folder / "wan.json"
    cells = {cell.name: {"link": cell.link} for cell in CELLS}
    source.write_text(json.dumps({"bench": "wan", "cells": cells, "rows": rows}), "utf-8")
    return draw(source, folder / "wan.svg")


def row_of(cell: Cell, text: str, temperature: float) -> dict[str, object]:
    ratio = {"value": 2.0, "low": 1.5, "high": 2.5}
    alone = {"value": 3.0, "low": None, "high": None}
    strategies = {"plain": {"over_plain": alone}, "tree-64": {"over_plain": ratio}, "auto": {"over_plain": alone}}
    return {"cell": cell.name, "text": text, "temperature": temperature, "strategies": strategies}


def test_one_reproducible_picture_per_temperature(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row_of(cell, text, t) for cell in CELLS[:2] for text in ("code", "zero") for t in (0.0, 1.0)]
    paths = draw_rows(tmp_path, rows)
    assert [path.name for path in paths] == ["wan-t0.svg", "wan-t1.svg"]
    first = [path.read_bytes() for path in paths]
    assert all(b"<svg" in picture for picture in first)
    assert [path.read_bytes() for path in draw_rows(tmp_path, rows)] == first
    assert [path.name for path in draw_rows(tmp_path, rows[:1])] == ["wan.svg"]


@pytest.mark.parametrize("text", ["", "[]", '{"bench": "tls"}'])
def test_what_is_no_figures_is_not_draw_rows(tmp_path: Path, text: str) -> None:
    pytest.importorskip("matplotlib")
    source = tmp_path / "no.json"
    source.write_text(text, "utf-8")
    with pytest.raises(BadRequest, match=r"no\.json"):
        draw(source, tmp_path / "no.svg")


def test_picture_is_svg_or_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (drawn_to,) = draw_rows(tmp_path, [row_of(CELLS[0], "code", 0.0)])
    source = tmp_path / "wan.json"
    assert draw(source, tmp_path / "wan.png")[0].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in drawn_to.read_bytes()
    with pytest.raises(BadRequest, match=r"\.svg or \.png"):
        draw(source, tmp_path / "wan.jpg")


def test_summary_of_one_traversal_is_finite() -> None:
    assert math.isfinite(summary([sample(1, 1e-9, rounds=1)], 0.1)["tokens_per_second_pooled"])
