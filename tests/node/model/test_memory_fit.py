"""The number of blocks that fit is as large as memory allows and no larger; footprints match real models."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.node.conftest import FAMILIES, tiny_model

from treeswarm.errors import BadRequest
from treeswarm.model_files import resolve_model
from treeswarm.protocol.spans import Span
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.memory_fit import USABLE_SHARE, Footprint, count_blocks_that_fit, free_memory, read_footprint
from treeswarm_node.model.span_model import SpanModel

sizes = st.integers(1, 10**10)
footprints = st.builds(Footprint, sizes, st.integers(0, 10**10), st.integers(1, 10**6), st.integers(1, 10**6))


def needed_bytes(count: int, footprint: Footprint, kv_tokens: int, forward_rows: int) -> int:
    """Return the bytes that `count` blocks need."""
    blocks = count * (footprint.block + footprint.kv_row * kv_tokens)
    return blocks + footprint.ends + footprint.forward_row * forward_rows


@given(st.integers(0, 10**13), footprints, st.integers(1, 10**5), st.integers(1, 4096), st.integers(1, 200))
def test_fitting_blocks_fit_and_one_more_would_not(
    room: int, footprint: Footprint, kv_tokens: int, forward_rows: int, blocks: int
) -> None:
    usable = room * USABLE_SHARE
    slack = 1e-6 * room + 1  # rounding of floats
    try:
        fit = count_blocks_that_fit(room, footprint, kv_tokens=kv_tokens, forward_rows=forward_rows, blocks=blocks)
    except BadRequest as error:
        assert "--kv-tokens" in str(error)
        assert needed_bytes(1, footprint, kv_tokens, forward_rows) > usable - slack
        return
    assert 1 <= fit <= blocks
    assert needed_bytes(fit, footprint, kv_tokens, forward_rows) <= usable + slack
    assert fit == blocks or needed_bytes(fit + 1, footprint, kv_tokens, forward_rows) > usable - slack


def test_missing_memory_is_named_in_units_of_its_size() -> None:
    footprint = Footprint(block=3 << 20, ends=1 << 20, kv_row=1 << 10, forward_row=0)
    with pytest.raises(BadRequest, match=r"512 KiB are free, one block with 1024 KV rows needs 5\.\d\d MiB: lower"):
        count_blocks_that_fit(512 << 10, footprint, kv_tokens=1024, forward_rows=1, blocks=8)
    with pytest.raises(BadRequest, match=r"1\.00 MiB are free to keep weights in, one block needs 3\.\d\d MiB: free"):
        count_blocks_that_fit(1 << 30, footprint, kv_tokens=1024, forward_rows=1, blocks=8, store=1 << 20)


@given(st.integers(0, 10**12), st.integers(0, 10**12), footprints)
def test_more_memory_never_means_fewer_blocks(first: int, second: int, footprint: Footprint) -> None:
    def fit(room: int) -> int:
        try:
            return count_blocks_that_fit(room, footprint, kv_tokens=1000, forward_rows=100, blocks=80)
        except BadRequest:
            return 0

    assert fit(min(first, second)) <= fit(max(first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_footprint_of_the_demo_model_matches_its_tensors(dtype: torch.dtype) -> None:
    check_footprint(resolve_model("demo"), dtype, blocks=8)


@pytest.mark.parametrize("family", ["llama", "mixtral", "phi3", "gemma2"])
def test_footprint_of_a_family_matches_its_tensors(family: str, tmp_path: Path) -> None:
    assert family in FAMILIES
    tiny_model(family).save_pretrained(tmp_path)
    check_footprint(tmp_path, torch.float32, blocks=4)


def check_footprint(folder: Path, dtype: torch.dtype, *, blocks: int) -> None:
    """Compare a model's footprint with the memory of loaded spans."""
    footprint = read_footprint(folder, dtype)
    middle = [loaded_bytes(folder, Span(i, i + 1), dtype) for i in range(1, blocks - 1)]
    assert footprint.block >= max(size for size, _ in middle)
    assert footprint.block == pytest.approx(max(size for size, _ in middle), rel=0.02)
    head, _ = loaded_bytes(folder, Span(0, 1), dtype)
    tail, _ = loaded_bytes(folder, Span(blocks - 1, blocks), dtype)
    # A node at either end has room for both ends; tied embeddings are one tensor that both ends hold.
    assert max(head, tail) - footprint.block <= footprint.ends * 1.02
    assert footprint.kv_row == middle[0][1]


def loaded_bytes(folder: Path, span: Span, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of a span's weights, and of one KV row in one block."""
    loaded = load_span(folder, span, dtype, torch.device("cpu"))
    store: KVStore = SpanModel(loaded, 128).store  # it holds the head in float32
    weights = {p.data_ptr(): p.nbytes for p in loaded.skeleton.parameters() if p.device.type != "meta"}
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
