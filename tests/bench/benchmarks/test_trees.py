"""`swarm bench trees` compares rules on the same novel prompts."""

import pytest

from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.trees import RULES, TextCounts, ratio_of
from treeswarm_client.drafters.union import UnionDrafter

NOVEL, LOOPING = 0.1, 0.9


def test_ratios_pool_the_novel_texts_of_both_rules() -> None:
    over = [TextCounts(40, 10, NOVEL), TextCounts(30, 10, NOVEL), TextCounts(90, 3, LOOPING)]
    under = [TextCounts(40, 20, NOVEL), TextCounts(30, 15, NOVEL), TextCounts(90, 90, NOVEL)]
    ratio = ratio_of(over, under)
    assert ratio is not None
    assert ratio.value == pytest.approx((70 / 20) / (70 / 35))
    assert ratio.draws.min() >= 1.5 - 1e-9
    assert ratio.draws.max() <= 2.0 + 1e-9
    single = ratio_of(over[:1], under[:1])
    assert single is not None
    assert (single.value, single.draws.size) == (2.0, 0)
    assert ratio_of(over[2:], under[2:]) is None


def test_the_union_has_the_measured_draft_model() -> None:
    union = RULES["union"](BenchSetup())
    assert isinstance(union, UnionDrafter)
    assert [member.name for member in union.members] == ["suffix", "recycling", "demo-draft"]
    assert RULES["ngram"](BenchSetup()).name == "ngram"
