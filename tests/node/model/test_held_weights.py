"""Weights that are held in their published bits are, where they are used, the very numbers that loading expands to."""

import contextlib
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.node.conftest import SpanChain
from tests.node.model.test_families import worst_difference
from tests.node.model.test_formats import SPANS, TOLERANCE, save_in, stock
from tests.support.quantized_checkpoints import (
    FORMATS,
    MXFP4_EXPERTS,
    PublishedFormat,
    gptq,
    is_git_projection,
    random_git,
    write_checkpoint,
)

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check.family_check import check_family, layer_kind
from treeswarm_node.model.check.kernel_check import check_kernels
from treeswarm_node.model.check.weights import check_weights
from treeswarm_node.model.checkpoint import parts
from treeswarm_node.model.checkpoint.dequantize.formulas import Codes, block_scaled
from treeswarm_node.model.checkpoint.loader import load_span, match_tensors
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.checkpoint.storage import held_blocks
from treeswarm_node.model.footprint import read_footprint
from treeswarm_node.model.offload import open_offload
from treeswarm_node.model.quantization.published_codes import hold
from treeswarm_node.model.quantization.quantized_linear import QuantizedExperts, QuantizedLinear, QuantizedWeight
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")
ALL_FORMATS = {**FORMATS, "mxfp4": MXFP4_EXPERTS}
IN_ORDER = PublishedFormat(FORMATS["gptq"].settings, lambda name, weight: gptq(name, weight, interleaved=False))


def save(published: str, tmp_path: Path) -> tuple[Path, Path]:
    family = "gpt-oss" if published == "mxfp4" else "qwen3-moe"
    return save_in(ALL_FORMATS[published], family, tmp_path)


@pytest.mark.parametrize(
    ("published", "dtype"),
    [(published, torch.float32) for published in ALL_FORMATS]
    + [(published, torch.bfloat16) for published in ("fp8 blocks", "mxfp4", "gptq", "bitsandbytes nf4")],
)
def test_held_weights_are_the_expanded_ones_bit_for_bit(published: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, _ = save(published, tmp_path)
    expanded = load_span(folder, Span(1, 3), dtype, CPU).skeleton
    held = load_span(folder, Span(1, 3), dtype, CPU, holds_codes=True).skeleton
    seen = 0
    for path, module in held.base_model.layers[1:3].named_modules():
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            name = f"{path}.weight" if isinstance(module, QuantizedLinear) else path
            assert torch.equal(module.dequantize(dtype), expanded.base_model.layers[1:3].get_parameter(name)), path
            seen += 1
    assert seen == (2 if published == "mxfp4" else 6) * 2, "projections and both matrices of experts"
    names = {name for name, _ in expanded.named_parameters()} - {name for name, _ in held.named_parameters()}
    assert len(names) == seen, "every other parameter is held as it was"


@pytest.mark.parametrize("published", ["fp8 blocks", "modelopt nvfp4", "mxfp4", "gptq", "bitsandbytes nf4, nested"])
def test_every_check_at_load_passes_with_held_weights(published: str, tmp_path: Path) -> None:
    folder, _ = save(published, tmp_path)
    model = SpanModel(load_span(folder, Span(1, 3), torch.float32, CPU, holds_codes=True), 1024)
    assert check_family(model).worst_difference < TOLERANCE
    assert check_weights(model) > 0
    assert check_kernels(model) < 1e-5


@pytest.mark.parametrize("published", ["fp8 blocks", "mxfp4", "gptq"])
def test_trees_over_spans_that_hold_codes_equal_stock(published: str, tmp_path: Path) -> None:
    folder, plain = save(published, tmp_path)
    spans = [load_span(folder, span, torch.float32, CPU, holds_codes=True) for span in SPANS]
    chain = SpanChain([SpanModel(span, 2048) for span in spans])
    assert worst_difference(stock(plain), chain, {"short": 9, "long": 61}) < TOLERANCE


@pytest.mark.parametrize("part_bytes", [1 << 28, 1 << 15])
def test_experts_that_are_read_in_parts_are_held_once(
    part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    for published in ("fp8 blocks", "mxfp4"):
        folder, _ = save(published, tmp_path / published)
        model = SpanModel(load_span(folder, Span(1, 3), torch.float32, CPU, holds_codes=True), 1024)
        assert sum(isinstance(module, QuantizedExperts) for module in model.loaded.skeleton.modules()) == 4
        assert check_weights(model) > 0


def test_a_scale_that_changes_in_memory_is_noticed(tmp_path: Path) -> None:
    folder, _ = save("fp8 blocks", tmp_path)
    model = SpanModel(load_span(folder, Span(1, 3), torch.float32, CPU, holds_codes=True), 1024)
    model.layers[0].mlp.experts.gate_up_proj.scale_1[2] *= 1.01
    with pytest.raises(UnsupportedModel, match=r"gate_up_proj in published differs"):
        check_weights(model)


def test_blocks_that_are_stored_in_other_bits_are_compared_too(tmp_path: Path) -> None:
    def write(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return gptq(name, weight, bits=8 if ".layers.2." in name else 4)

    folder, _ = save_in(PublishedFormat(FORMATS["gptq"].settings, write), "qwen3-moe", tmp_path)
    model = SpanModel(load_span(folder, Span(0, 4), torch.float32, CPU, holds_codes=True), 1024)
    assert len({layer_kind(model, index) for index in (0, 1, 3)}) == 1
    assert check_weights(model) > 0
    model.layers[2].self_attn.q_proj.weight.scale[0] *= 1.01
    with pytest.raises(UnsupportedModel, match=r"layers\.2\.self_attn\.q_proj.weight in published differs"):
        check_weights(model)


def test_a_zero_that_changes_in_a_kernels_weight_is_noticed(tmp_path: Path) -> None:
    folder, _ = save("awq", tmp_path)
    model = SpanModel(load_span(folder, Span(1, 2), torch.float32, CPU, quantization="published"), 1024)
    both = model.layers[0].self_attn.q_proj.weight.scales
    both[..., 1] += both[..., 0]  # as if zeros were stored smaller by one
    with pytest.raises(UnsupportedModel, match=r"q_proj.weight in int4 differs"):
        check_weights(model)


@pytest.mark.parametrize("published", ["compressed int8", "bitsandbytes 8 bits", "awq"])
def test_what_16_bits_round_in_a_kernels_weight_is_accepted(published: str, tmp_path: Path) -> None:
    folder, _ = save(published, tmp_path)
    model = SpanModel(load_span(folder, Span(1, 2), torch.bfloat16, CPU, quantization="published"), 1024)
    kinds = {m.kind for m in model.layers[0].modules() if isinstance(m, QuantizedWeight)}
    assert kinds == {"int4" if published == "awq" else "int8"}
    assert check_weights(model) > 0


def test_a_kernel_takes_no_scales_of_blocks_for_those_of_rows() -> None:
    codes = torch.randint(-127, 128, (4, 8), dtype=torch.int8)
    scale = torch.rand(2, 2) + 0.5  # as many numbers as there are rows
    blocks = Codes({"weight": codes, "scale": scale}, partial(block_scaled, block=(2, 4), product=torch.float32))
    matrix, held = hold(blocks, torch.float32, by_kernel=True)
    expected = blocks.expand(blocks.parts, torch.float32)
    assert torch.equal(matrix.dequantize(held, codes.shape, torch.float32), expected)


def test_experts_that_are_stored_in_another_way_than_the_first_are_refused(tmp_path: Path) -> None:
    folder, _ = save("gptq", tmp_path)
    path, name = folder / "model.safetensors", "model.layers.1.mlp.experts.2.up_proj.g_idx"
    tensors = load_file(path)
    save_file(tensors | {name: torch.arange(64, dtype=torch.int32) // 32}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"experts\.2\.up_proj.*--expand load"):
        load_span(folder, Span(1, 2), torch.float32, CPU, holds_codes=True)


def test_the_footprint_is_what_a_block_takes(tmp_path: Path) -> None:
    for published in ("fp8 blocks", "mxfp4", "gptq", "gptq 2 bits", "bitsandbytes nf4"):
        folder, _ = save(published, tmp_path / published.replace(" ", "-"))
        layer = load_span(folder, Span(1, 2), torch.bfloat16, CPU, holds_codes=True).skeleton.base_model.layers[1]
        size = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
        skeleton = build_skeleton(folder, torch.bfloat16)
        held = held_blocks(match_tensors(folder, skeleton, Span(0, 4)).block_weights)
        footprint = read_footprint(skeleton, torch.bfloat16, "none", "cpu", held)
        assert footprint.block == pytest.approx(size, rel=0.12)
        assert footprint.block < 0.75 * read_footprint(skeleton, torch.bfloat16, "none", "cpu").block


def test_weights_of_blocks_with_an_unusual_name_are_held(tmp_path: Path) -> None:
    plain = write_checkpoint(random_git(), FORMATS["fp8 blocks"], tmp_path / "git", is_git_projection)
    loaded = load_span(tmp_path / "git", Span(1, 2), torch.float32, CPU, holds_codes=True)
    expected = load_span(plain, Span(1, 2), torch.float32, CPU)
    held = {path: m for path, m in loaded.skeleton.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(held) == 6
    for path, module in held.items():
        assert path.startswith("git.encoder.layer.1.")
        torch.testing.assert_close(module.dequantize(torch.float32), expected.skeleton.get_parameter(f"{path}.weight"))


@pytest.mark.parametrize(
    ("published", "kind"),
    [("bitsandbytes nf4, nested", "none"), ("bitsandbytes fp4", "none"), ("gptq 2 bits", "none"), ("awq", "none")]
    + [(published, "published") for published in ("awq", "compressed int4")],
)
def test_bytes_of_a_held_weight_are_those_of_its_parts(published: str, kind: str, tmp_path: Path) -> None:
    folder, _ = save(published, tmp_path)
    loaded = load_span(folder, Span(1, 2), torch.bfloat16, CPU, holds_codes=kind == "none", quantization=kind)
    modules = [m for m in loaded.skeleton.base_model.layers[1].modules() if isinstance(m, QuantizedWeight)]
    size = sum(tensor.nbytes for module in modules for tensor in module.parts().values())
    weights = match_tensors(folder, build_skeleton(folder, torch.bfloat16), Span(1, 2)).block_weights
    assert held_blocks(weights, by_kernel=kind == "published")[1].size == size


def test_held_weights_can_be_offloaded(tmp_path: Path) -> None:
    folder, plain = save("fp8 blocks", tmp_path)
    with contextlib.ExitStack() as stack:
        models = []
        for span in SPANS:
            offload = stack.enter_context(open_offload(CPU, "disk"))
            models.append(
                SpanModel(load_span(folder, span, torch.float32, CPU, offload=offload, holds_codes=True), 2048)
            )
        assert worst_difference(stock(plain), SpanChain(models), {"short": 9, "long": 61}) < TOLERANCE


KERNEL_FORMATS = ("compressed int4", "awq", "gptq 4 bits in order", "compressed int8", "bitsandbytes 8 bits")


@pytest.mark.parametrize("published", KERNEL_FORMATS)
def test_kernels_multiply_with_the_published_integers(published: str, tmp_path: Path) -> None:
    folder, plain = save_in(IN_ORDER if "order" in published else FORMATS[published], "qwen3-moe", tmp_path)
    loaded = load_span(folder, Span(0, 4), torch.float32, CPU, quantization="published")
    kinds = {m.kind for m in loaded.skeleton.modules() if isinstance(m, QuantizedWeight)}
    eight = "8" in published
    assert kinds == {"int8" if eight else "int4"}
    expected = dict(stock(plain).named_parameters())
    for path, module in loaded.skeleton.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            weight = expected[f"{path}.weight" if isinstance(module, QuantizedLinear) else path]
            # The kernel for 4 bits has scales and offsets of 8 bits of precision, the one for 8 bits those of the file.
            error = float((module.dequantize(torch.float32) - weight).norm() / weight.norm())
            assert error < (1e-6 if eight else 0.005), path
    model = SpanModel(loaded, 2048)
    assert check_family(model).worst_difference < TOLERANCE
    assert check_weights(model) > 0
    assert check_kernels(model) < (1e-3 if eight else 0.02)


def test_integers_without_a_kernel_keep_their_bits_and_their_numbers(tmp_path: Path) -> None:
    folder, plain = save("gptq", tmp_path)  # groups of interleaved columns
    loaded = load_span(folder, Span(0, 4), torch.float32, CPU, quantization="published")
    assert {m.kind for m in loaded.skeleton.modules() if isinstance(m, QuantizedWeight)} == {"published"}
    chain = SpanChain([SpanModel(loaded, 2048)])
    assert worst_difference(stock(plain), chain, {"short": 9}) < TOLERANCE


def test_weights_without_integers_have_no_kernel(tmp_path: Path) -> None:
    folder, _ = save("fp8 blocks", tmp_path)
    with pytest.raises(UnsupportedModel, match=r"no kernel multiplies with FP8 in blocks of 32×32.*--expand use"):
        load_span(folder, Span(0, 1), torch.float32, CPU, quantization="published")
