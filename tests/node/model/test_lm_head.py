"""A large LM head is held in 16 bits, and its logits are those of a float32 copy."""

from pathlib import Path

import pytest
import torch
from tests.node.conftest import tiny_model

from treeswarm.model_files import resolve_model
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check.weights import check_weights
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.families import lm_head
from treeswarm_node.model.families.lm_head import SlicedHead
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_sliced_products_are_those_of_a_float32_copy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lm_head.SLICE_BYTES, "cpu", 1)
    head = torch.nn.Linear(96, 1000, bias=True, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(rows, 96)
    expected = torch.nn.functional.linear(hidden, head.weight.float(), head.bias.float())
    sliced = SlicedHead(head)
    assert sliced._rows == 256, "1,000 rows are not a multiple of a slice"
    torch.testing.assert_close(sliced(hidden), expected, rtol=1e-6, atol=1e-6)


def logits_of(folder: Path, span: Span) -> tuple[SpanModel, torch.Tensor]:
    model = SpanModel(load_span(folder, span, torch.bfloat16, CPU), 128)
    hidden = torch.randn(5, model.hidden_size, generator=torch.Generator().manual_seed(7))
    return model, model.logits(hidden)


@pytest.mark.parametrize("span", [Span(7, 8), Span(0, 8)], ids=["tail", "whole"])
def test_a_large_head_is_held_in_16_bits_once(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("demo")
    _, expected = logits_of(folder, span)
    monkeypatch.setattr(lm_head, "MAX_COPY_BYTES", 0)
    model, logits = logits_of(folder, span)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert model._head is not None
    head = model._head.output_embeddings
    assert isinstance(head, SlicedHead)
    held = [*model._head.model.parameters(), *model.loaded.skeleton.parameters()]
    matrices = {p.data_ptr() for p in held if p.shape == head.weight.shape and p.device.type != "meta" and p.any()}
    assert matrices == {head.weight.data_ptr()}, "embedding and head of this model are tied"
    assert check_weights(model) > 0


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_caps_and_scales_of_a_family_follow_a_sliced_head(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    _, expected = logits_of(tmp_path, Span(2, 4))
    monkeypatch.setattr(lm_head, "MAX_COPY_BYTES", 0)
    _, logits = logits_of(tmp_path, Span(2, 4))
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
