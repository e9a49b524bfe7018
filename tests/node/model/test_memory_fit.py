"""The number of blocks that fit is as large as memory allows and no larger; footprints match real models."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.node.conftest import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from treeswarm.errors import BadRequest
from treeswarm.model_files import resolve_model
from treeswarm.protocol.spans import Span
from treeswarm.topology.span_limits import SpanLimits
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.families import lm_head
from treeswarm_node.model.footprint import read_footprint
from treeswarm_node.model.memory_fit import (
    USABLE_SHARE,
    EndWeights,
    Footprint,
    NodeRoom,
    count_blocks_that_fit,
    free_memory,
    peak_bytes,
)
from treeswarm_node.model.span_model import SpanModel

EXPERTS = ("num_experts", "num_local_experts")
sizes = st.integers(0, 10**10)
footprints = st.builds(
    Footprint,
    st.integers(1, 10**10),
    st.builds(EndWeights, sizes, sizes, sizes, sizes),
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    sizes,
    sizes,
)
rooms = st.builds(NodeRoom, st.integers(0, 10**13), st.none(), st.integers(1, 10**5), st.integers(1, 4096))


def needed_bytes(count: int, footprint: Footprint, ends: int, room: NodeRoom) -> int:
    """Return the most bytes that `count` blocks need: while they are loaded, checked or computed with."""
    weights, cache = count * footprint.block + ends, count * footprint.kv_row * room.kv_tokens
    return max(
        weights + footprint.loading,
        weights + cache + footprint.checking,
        weights + cache + footprint.forward_row * room.forward_rows,
    )


@given(rooms, footprints, st.integers(2, 200))
def test_fitting_blocks_fit_and_one_more_would_not(room: NodeRoom, footprint: Footprint, blocks: int) -> None:
    usable = room.memory * USABLE_SHARE
    slack = 1e-6 * room.memory + 1  # rounding of floats
    ends = footprint.ends
    try:
        limits = count_blocks_that_fit(room, footprint, blocks)
    except BadRequest as error:
        assert "--kv-tokens" in str(error)
        least = min(needed_bytes(1, footprint, of, room) for of in (ends.middle, ends.head, ends.tail))
        assert least > usable - slack
        return
    for fit, of in ((limits.middle, ends.middle), (limits.head, ends.head), (limits.tail, ends.tail)):
        assert 0 <= fit < blocks
        assert fit == 0 or needed_bytes(fit, footprint, of, room) <= usable + slack
        assert fit == blocks - 1 or needed_bytes(fit + 1, footprint, of, room) > usable - slack
    whole = needed_bytes(blocks, footprint, ends.whole, room)
    assert whole <= usable + slack if limits.whole else whole > usable - slack


@given(rooms, footprints, st.integers(1, 99))
def test_the_peak_that_is_said_is_what_is_needed(room: NodeRoom, footprint: Footprint, blocks: int) -> None:
    for ends in (footprint.ends.middle, footprint.ends.tail):
        assert peak_bytes(blocks, room, footprint, ends) == needed_bytes(blocks, footprint, ends, room)


def test_missing_memory_is_named_in_units_of_its_size() -> None:
    footprint = Footprint(block=3 << 20, ends=EndWeights(1 << 20, 2 << 20, 1 << 20), kv_row=1 << 10, forward_row=0)
    with pytest.raises(BadRequest, match=r"512 KiB are free, one block with 1024 KV rows needs 5\.\d\d MiB: lower"):
        count_blocks_that_fit(NodeRoom(512 << 10, None, 1024, 1), footprint, 8)
    with pytest.raises(BadRequest, match=r"1\.00 MiB are free to keep weights in, one block needs 3\.\d\d MiB: free"):
        count_blocks_that_fit(NodeRoom(1 << 30, 1 << 20, 1024, 1), footprint, 8)


@given(st.integers(0, 10**12), st.integers(0, 10**12), footprints)
def test_more_memory_never_means_fewer_blocks(first: int, second: int, footprint: Footprint) -> None:
    def fit(memory: int) -> SpanLimits:
        try:
            return count_blocks_that_fit(NodeRoom(memory, None, 1000, 100), footprint, 80)
        except BadRequest:
            return SpanLimits(0, 0, 0, whole=False)

    less, more = fit(min(first, second)), fit(max(first, second))
    assert less.at_most(more.middle).middle == less.middle
    assert (less.head, less.tail, less.whole) <= (max(less.head, more.head), max(less.tail, more.tail), more.whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_footprint_of_the_demo_model_matches_its_tensors(dtype: torch.dtype) -> None:
    check_footprint(resolve_model("demo"), dtype, blocks=8)


@pytest.mark.parametrize("copied", [1 << 30, 0], ids=["head copied", "head in 16 bits"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "phi3", "gemma2"])
def test_footprint_of_a_family_matches_its_tensors(
    family: str, copied: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert family in FAMILIES
    monkeypatch.setattr(lm_head, "MAX_COPY_BYTES", copied)
    tiny_model(family).save_pretrained(tmp_path)
    check_footprint(tmp_path, torch.float32 if copied else torch.bfloat16, blocks=4)


def test_a_model_whose_blocks_need_embeddings_holds_them_everywhere() -> None:
    config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=4, num_kv_shared_layers=0)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    ends = read_footprint(skeleton, torch.bfloat16, "none", "cpu").ends
    per_layer = config.vocab_size_per_layer_input * 4 * config.hidden_size_per_layer_input
    assert ends.middle > 2 * (per_layer + config.vocab_size * config.hidden_size)
    assert ends.middle <= ends.head <= ends.whole


def test_matrices_that_stay_plain_are_counted_plain() -> None:
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=5)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    plain, packed = (read_footprint(skeleton, torch.bfloat16, kind, "cuda") for kind in ("none", "int8"))
    expert, experts = 3 * 7168 * 2048, 257
    attention = 1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 128 * 256 * 512 + 7168 * 128 * 128
    router, norms = 256 * 7168, 2 * 7168 + 1536 + 512
    assert plain.block == 2 * (experts * expert + attention + router + norms)
    assert packed.block == pytest.approx(experts * expert + attention + 128 * 256 * 512 + 2 * router, rel=0.01)
    assert packed.loading < 1 << 30, "three copies of a part, not a block of 21 GiB"
    assert packed.checking < 2 << 30


@pytest.mark.parametrize("model_type", ["llama4_text", "qwen3_moe"])  # filled with zeros, and not
def test_skeleton_needs_no_memory_for_its_weights(tmp_path: Path, model_type: str) -> None:
    config = AutoConfig.for_model(
        model_type,
        num_hidden_layers=2,
        hidden_size=8192,
        intermediate_size=8192,
        num_experts=4096,
        num_local_experts=4096,
    )
    config.save_pretrained(tmp_path)
    skeleton = build_skeleton(tmp_path, torch.bfloat16)
    experts = max(skeleton.parameters(), key=torch.Tensor.numel)
    assert experts.numel() >= 4096 * 2**20 * 2
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert "meta" not in {buffer.device.type for buffer in skeleton.buffers()}


def check_footprint(folder: Path, dtype: torch.dtype, *, blocks: int) -> None:
    """Compare a model's footprint with the memory of loaded spans."""
    footprint = read_footprint(build_skeleton(folder, dtype), dtype, "none", "cpu")
    middle = [loaded_bytes(folder, Span(i, i + 1), dtype) for i in range(1, blocks - 1)]
    assert footprint.block == max(size for size, _ in middle)
    assert footprint.ends.middle == 0
    for span, ends in ((Span(0, 1), footprint.ends.head), (Span(blocks - 1, blocks), footprint.ends.tail)):
        size, _ = loaded_bytes(folder, span, dtype)
        assert size - footprint.block == pytest.approx(ends, rel=0.02)
    whole, _ = loaded_bytes(folder, Span(0, blocks), dtype)
    assert whole - blocks * footprint.block == pytest.approx(footprint.ends.whole, rel=0.02)
    assert footprint.kv_row == middle[0][1]


def loaded_bytes(folder: Path, span: Span, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of a span's weights, and of one KV row in one block."""
    loaded = load_span(folder, span, dtype, torch.device("cpu"))
    model = SpanModel(loaded, 128)
    store: KVStore = model.store
    parameters = [*loaded.skeleton.parameters(), *([model._head.output_embeddings.weight] if model._head else [])]
    weights = {p.data_ptr(): p.nbytes for p in parameters if p.device.type != "meta"}
    return sum(weights.values()), store.row_bytes // len(span)


def test_a_tail_in_16_bits_holds_its_head_once() -> None:
    folder = resolve_model("demo")
    for span, dtype in ((Span(7, 8), torch.bfloat16), (Span(7, 8), torch.float32), (Span(0, 8), torch.bfloat16)):
        model = SpanModel(load_span(folder, span, dtype, torch.device("cpu")), 128)
        assert model._head is not None
        head = model._head.output_embeddings.weight
        assert head.dtype == torch.float32
        parameters = [head, *model.loaded.skeleton.parameters()]
        matrices = {p.data_ptr() for p in parameters if p.shape == head.shape and p.device.type != "meta"}
        assert len(matrices) == (1 if span.start else 2), "the hosted embedding is another matrix in 16 bits"


def test_free_memory_of_this_machine_is_plausible() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


def test_a_speculator_is_counted_with_the_last_block() -> None:
    footprint = Footprint(block=100, ends=EndWeights(), kv_row=0, forward_row=0)

    def limits(memory: int, speculator: int, *, gives_way: bool = False) -> SpanLimits:
        room = NodeRoom(int(memory / USABLE_SHARE) + 1, None, 1, 1, speculator, gives_way)
        return count_blocks_that_fit(room, footprint, 8)

    assert limits(800, 0) == SpanLimits(7, 7, 7, whole=True)
    assert limits(700, 250) == SpanLimits(7, 7, 4, whole=False)
    assert limits(800, 250) == SpanLimits(7, 7, 5, whole=False)
    # A speculator that nobody asked for by name does not cost the whole model, nor the last block.
    assert limits(800, 250, gives_way=True) == SpanLimits(7, 7, 7, whole=True)
    assert limits(700, 250, gives_way=True) == SpanLimits(7, 7, 4, whole=False)
    assert limits(300, 250, gives_way=True) == SpanLimits(3, 3, 3, whole=False)
    assert limits(300, 250) == SpanLimits(3, 3, 0, whole=False)


def test_taps_are_counted_where_the_speculator_is_not() -> None:
    footprint = Footprint(block=100, ends=EndWeights(), kv_row=0, forward_row=0)
    room = NodeRoom(int(500 / USABLE_SHARE) + 1, None, 1, 1, speculator=250, taps=150)
    assert count_blocks_that_fit(room, footprint, 8) == SpanLimits(3, 3, 2, whole=False)
