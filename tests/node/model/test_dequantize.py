"""A weight that several tensors store in fewer bits is read as its format defines it, and never without its scales."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.support.quantized_checkpoints import FORMATS, MXFP4_EXPERTS, PublishedFormat, fp8_blocks

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm_node.model.checkpoint.dequantize.recognition import StoredWeight, TensorEntry
from treeswarm_node.model.checkpoint.dequantize.stored_weights import LOW_BITS, StoredWeights, find_stored_weights

DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8",
    torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
NAME = "model.layers.0.self_attn.q_proj.weight"


def a_weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 0.15


def find(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> StoredWeights:
    entries = {name: TensorEntry(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return find_stored_weights(entries, settings)


def read(weight: StoredWeight, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return weight.unpack({role: tensors[name] for role, name in weight.parts.items()}, dtype)


@pytest.mark.parametrize("published", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", [NAME, "model.layers.0.mlp.experts.3.up_proj.weight"], ids=["dense", "expert"])
def test_weight_is_what_its_codes_mean(published: PublishedFormat, name: str) -> None:
    tensors, meant = published.write(name, a_weight(96, 128))
    plain = {"model.norm.weight": torch.ones(4)}
    found = find(tensors | plain, published.settings)
    assert list(found.weights) == [name]
    assert not any(part in found.plain for part in found.weights[name].parts.values())
    assert found.plain >= set(plain)
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(read(found.weights[name], tensors, dtype), meant.to(dtype), rtol=0, atol=1e-7)


def test_fused_experts_of_gpt_oss() -> None:
    tensors, meant = MXFP4_EXPERTS.write("model.layers.0.mlp.experts.gate_up_proj", a_weight(3, 64, 96))
    weight = find(tensors, MXFP4_EXPERTS.settings).weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert weight.shape == (3, 64, 96)
    assert torch.equal(read(weight, tensors, torch.float32), meant)


def test_last_blocks_of_a_matrix_may_be_smaller() -> None:
    tensors, meant = fp8_blocks(NAME, a_weight(75, 100))
    weight = find(tensors, {"weight_block_size": [32, 32]}).weights[NAME]
    assert torch.equal(read(weight, tensors, torch.float32), meant)


@pytest.mark.parametrize("published", FORMATS.values(), ids=FORMATS)
def test_weight_without_one_of_its_tensors_is_refused(published: PublishedFormat) -> None:
    tensors, _ = published.write(NAME, a_weight(96, 128))
    found = find(tensors, published.settings)
    for role, part in found.weights[NAME].parts.items():
        without = {name: tensor for name, tensor in tensors.items() if name != part}
        if role == "layout" or (role == "group_of" and "desc_act" not in published.settings):
            continue
        if role == "weight" and not any(DTYPES[tensor.dtype] in LOW_BITS for tensor in without.values()):
            assert find(without, published.settings).weights == {}  # a scale alone is a tensor like any other
        else:
            with pytest.raises((ModelError, UnsupportedModel), match=r"q_proj\.weight"):
                find(without, published.settings)


@pytest.mark.parametrize("published", ["gptq", "awq"])
def test_groups_of_another_size_than_the_config_names_are_refused(published: str) -> None:
    tensors, _ = FORMATS[published].write(NAME, a_weight(96, 128))
    in_order = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    settings = {**FORMATS[published].settings, "desc_act": False}
    assert find(in_order, settings).weights[NAME].shape == (96, 128)
    with pytest.raises(UnsupportedModel, match=r"q_proj.weight has 128 inputs in 4 groups.* groups of 48"):
        find(in_order, {**settings, "group_size": 48})
    mixed = {**settings, "group_size": 48, "dynamic": {"q_proj": {"group_size": 32}}}
    assert find(in_order, mixed).weights[NAME].shape == (96, 128)


@pytest.mark.parametrize("published", FORMATS.values(), ids=FORMATS)
def test_scale_of_another_shape_is_refused(published: PublishedFormat) -> None:
    tensors, _ = published.write(NAME, a_weight(96, 128))
    scale = find(tensors, published.settings).weights[NAME].parts["scale"]
    wrong = tensors[scale].reshape(-1)[:1].expand(5, 7)
    with pytest.raises(ModelError, match=scale.replace(".", r"\.")):
        find({**tensors, scale: wrong}, published.settings)
