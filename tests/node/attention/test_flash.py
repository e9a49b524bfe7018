"""The flash adapter supports certain inputs, merges parts into one softmax, and is selected only if it is correct."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.node.conftest import CPU, tiny_model

from treeswarm.errors import BadRequest
from treeswarm_node.attention import flash
from treeswarm_node.attention.adapter_check import TOLERANCES, measure_disagreement
from treeswarm_node.attention.base import TorchReference
from treeswarm_node.attention.flash import FlashAttention, KernelInputs, explain_unsupported, merge_parts
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.model.attention_selection import (
    check_attention_choice,
    choose_attention,
    should_use_flash,
    use_if_correct,
)
from treeswarm_node.model.span_model import SpanModel

AMPERE = KernelInputs("cuda", (8, 0), torch.bfloat16, 128, 128)
CPU_INPUTS = KernelInputs("cpu", (0, 0), torch.float32, 128, 128)


class TestExplainUnsupported:
    @pytest.mark.parametrize(
        "inputs",
        [
            AMPERE,
            replace(AMPERE, dtype=torch.float16, capability=(9, 0)),
            replace(AMPERE, capability=(12, 0), key_dim=256, value_dim=256),
            CPU_INPUTS,
            replace(CPU_INPUTS, dtype=torch.bfloat16, key_dim=17, value_dim=17),
        ],
    )
    def test_supported_inputs(self, inputs: KernelInputs) -> None:
        assert explain_unsupported(inputs) is None

    @pytest.mark.parametrize(
        ("inputs", "reason"),
        [
            (replace(CPU_INPUTS, device="mps"), "no flash kernel for mps"),
            (replace(AMPERE, capability=(7, 5)), r"8\.0, this device has 7\.5"),
            (replace(AMPERE, dtype=torch.float32), "cuda does not compute in float32"),
            (replace(CPU_INPUTS, dtype=torch.float64), "cpu does not compute in float64"),
            (replace(AMPERE, value_dim=64), "differ in size"),
            (replace(AMPERE, key_dim=320, value_dim=320), "heads of 320"),
            (replace(AMPERE, key_dim=20, value_dim=20), "heads of 20"),
            (replace(AMPERE, softcap=True), "does not cap scores"),
            (replace(CPU_INPUTS, sinks=True), "does not support attention sinks"),
        ],
    )
    def test_unsupported_inputs_are_refused_by_reason(self, inputs: KernelInputs, reason: str) -> None:
        with pytest.raises(BadRequest, match=rf"--attention flash cannot be used.*{reason}.*: give --attention auto"):
            should_use_flash("flash", inputs)
        assert not should_use_flash("auto", inputs)
        assert not should_use_flash("torch", inputs)


def test_auto_uses_flash_on_cuda_only() -> None:
    assert [should_use_flash("auto", AMPERE), should_use_flash("auto", CPU_INPUTS)] == [True, False]
    assert [should_use_flash("flash", AMPERE), should_use_flash("flash", CPU_INPUTS)] == [True, True]
    assert not should_use_flash("torch", AMPERE)


def test_unsupported_device_is_refused_before_loading() -> None:
    check_attention_choice("auto", torch.device("mps"), torch.float32)
    with pytest.raises(BadRequest, match="no flash kernel for mps"):
        check_attention_choice("flash", torch.device("mps"), torch.float32)


@st.composite
def softmaxes(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Draw scores [rows, keys], values [keys, dim] and the parts' key counts.

    A row may not see any key of a part, except of the last.
    """
    counts = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    rows, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, sum(counts), generator=generator) * draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    hidden = torch.rand(rows, len(counts) - 1, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    columns = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for part in range(len(counts) - 1):
        scores[hidden[:, part][:, None] & (columns == part)] = -torch.inf
    return scores, torch.randn(sum(counts), 3, generator=generator), counts


@given(softmaxes())
def test_parts_merge_into_one_softmax(case: tuple[torch.Tensor, torch.Tensor, list[int]]) -> None:
    scores, values, counts = case
    parts = []
    for part, value in zip(scores.split(counts, -1), values.split(counts), strict=True):
        parts.append((part.softmax(-1).nan_to_num() @ value, part.logsumexp(-1)))
    torch.testing.assert_close(merge_parts(parts), scores.softmax(-1) @ values, atol=1e-5, rtol=1e-4)


class TestAdapterCheck:
    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    @pytest.mark.parametrize(("heads", "shape"), [(8, KVShape(2, 128, 128)), (4, KVShape(4, 24, 24))])
    def test_flash_agrees_with_the_reference(self, heads: int, shape: KVShape, dtype: torch.dtype) -> None:
        assert measure_disagreement(FlashAttention(CPU), heads, shape, dtype, CPU) < TOLERANCES[dtype] / 3

    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    def test_merge_with_wrong_shares_differs_widely(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        original = flash.merge_parts
        monkeypatch.setattr(
            flash, "merge_parts", lambda parts: original([(o, torch.zeros_like(logsumexp)) for o, logsumexp in parts])
        )
        difference = measure_disagreement(FlashAttention(CPU), 8, KVShape(2, 64, 64), dtype, CPU)
        assert difference > 10 * TOLERANCES[dtype]

    def test_nan_output_is_infinite_disagreement(self) -> None:
        def broken(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            output, logsumexp = flash.flash_kernel(*_)
            return output * torch.nan, logsumexp

        assert measure_disagreement(FlashAttention(CPU, broken), 4, KVShape(2, 16, 16), torch.float32, CPU) == float(
            "inf"
        )


class TestAttentionSelection:
    @pytest.fixture
    def model(self, cut_in_three: Any) -> SpanModel:
        model: SpanModel = cut_in_three(tiny_model("llama")).models[1]
        return model

    @pytest.mark.parametrize(
        ("choice", "name"), [("auto", "torch-sdpa"), ("torch", "torch-reference"), ("flash", "torch-flash")]
    )
    def test_choice_on_a_cpu(self, model: SpanModel, choice: str, name: str) -> None:
        choose_attention(model, choice)
        assert model.attention_name == name

    def test_adapter_that_fails_its_check_is_not_used(self, model: SpanModel, caplog: pytest.LogCaptureFixture) -> None:
        def wrong(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            output, logsumexp = flash.flash_kernel(*_)
            return output, torch.zeros_like(logsumexp)

        adapter = FlashAttention(CPU, wrong)
        with caplog.at_level(logging.WARNING):
            use_if_correct(model, adapter, required=False)
        assert isinstance(model.attention, TorchReference)
        (message,) = caplog.messages
        assert message.startswith(
            "attention: using torch-reference instead of torch-flash, because it differs from plain"
        )
        with pytest.raises(BadRequest, match=r"differs from plain attention by .*: give --attention auto"):
            use_if_correct(model, adapter, required=True)

    def test_kernel_that_does_not_run_is_not_used(self, model: SpanModel, caplog: pytest.LogCaptureFixture) -> None:
        def missing(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            raise RuntimeError("no kernel image is available\nfor execution on the device")

        with caplog.at_level(logging.WARNING):
            use_if_correct(model, FlashAttention(CPU, missing), required=False)
        assert isinstance(model.attention, TorchReference)
        assert caplog.messages[0].endswith("its check failed: no kernel image is available")
