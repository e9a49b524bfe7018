"""Matrices in eight bits come back within half a step of their row's scale; everything else comes back as it was."""

import torch

from treeswarm_node.speculator.packing import packed, unpacked


def test_matrices_lose_no_more_than_half_a_step_of_their_row() -> None:
    torch.manual_seed(1)
    weights = {
        "matrix": torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 40.0, 0.0, 1.0])[:, None],
        "norm": torch.randn(7),
        "vocabulary": torch.arange(9, dtype=torch.int32),
        "ids": torch.arange(6).reshape(2, 3),
    }
    small = packed(weights)
    assert small["matrix"].dtype == torch.int8
    back = unpacked(small)
    assert back.keys() == weights.keys()
    step = weights["matrix"].abs().amax(1, keepdim=True) / 127
    assert bool(((back["matrix"] - weights["matrix"]).abs() <= 0.5001 * step).all())
    assert all(torch.equal(back[name], weights[name]) for name in ("norm", "vocabulary", "ids"))


def test_rounding_again_changes_nothing() -> None:
    once = unpacked(packed({"matrix": torch.randn(4, 8)}))
    assert torch.equal(unpacked(packed(once))["matrix"], once["matrix"])
