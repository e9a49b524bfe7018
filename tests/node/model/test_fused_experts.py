"""Experts are merged as transformers merges them, and no matrix is kept beside the merged tensor."""

import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist

from treeswarm_node.model.checkpoint.fused_experts import FuseExperts, fuse_in_place

GATE, UP, BOTH = "experts.*.gate_proj.weight", "experts.*.up_proj.weight", "experts.gate_up_proj"


def matrices() -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(0)
    return {name: [torch.randn(6, 5) for _ in range(4)] for name in (UP, GATE)}


def test_result_is_that_of_transformers_operations() -> None:
    merged = MergeModulelist(dim=0).convert(matrices(), [GATE, UP], [BOTH])
    expected = Concatenate(dim=1).convert(merged, [GATE, UP], [BOTH])
    assert torch.equal(FuseExperts().convert(matrices(), [GATE, UP], [BOTH])[BOTH], expected[BOTH])


def test_every_matrix_is_freed_when_it_is_copied() -> None:
    given = matrices()
    lists = list(given.values())
    alive = [weakref.ref(matrix) for each in lists for matrix in each]
    FuseExperts().convert(given, [GATE, UP], [BOTH])
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_experts_that_do_not_fit_together_are_an_error(change: str) -> None:
    given = matrices()
    given[UP][2:3] = [] if change == "missing" else [torch.ones(1, 5)]
    with pytest.raises(ValueError, match=r"have|expert 2"):
        FuseExperts().convert(given, [GATE, UP], [BOTH])


def test_conversions_of_a_mixture_are_replaced() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", num_hidden_layers=1))
    operations = [c.operations for c in fuse_in_place(get_model_conversion_mapping(model)) if hasattr(c, "operations")]
    assert [[type(operation) for operation in each] for each in operations] == [[FuseExperts], [FuseExperts]]
