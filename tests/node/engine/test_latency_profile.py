"""The latency profile that a node measures at load covers its span and leaves no KV rows in use."""

from types import SimpleNamespace

import pytest
import torch

from treeswarm.model_files import resolve_model
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.spans import Span
from treeswarm_node.engine import latency_profile
from treeswarm_node.engine.latency_profile import LONGEST_S, SIZES, measure_profile, scale_profile
from treeswarm_node.engine.model_runner import ModelRunner
from treeswarm_node.engine.sampler import Sampler
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.model.span_model import SpanModel


@pytest.mark.parametrize("span", [Span(0, 1), Span(3, 5), Span(7, 8)], ids=str)
@pytest.mark.parametrize("kv_tokens", [64, 2048])
def test_profile_is_measured_at_head_middle_and_tail(span: Span, kv_tokens: int) -> None:
    loaded = load_span(resolve_model("demo"), span, torch.float32, torch.device("cpu"), lambda *_: None)
    model = SpanModel(loaded, kv_tokens)
    vocab, hidden = loaded.config.vocab_size, loaded.config.hidden_size
    served = ServedSpan(span, 8, vocab, hidden, 2048, "", NumericsClass("", "float32"), "", 4 * hidden)
    free = model.store.free_tokens
    profile = measure_profile(ModelRunner(model, Sampler(vocab)), served, model.store)
    assert [rows for rows, _ in profile] == list(SIZES[: len(profile)])
    assert all(micros > 0 for _, micros in profile)
    assert bool(profile) == (kv_tokens > 64)  # one page is too small for a session
    assert all(rows < free for rows, _ in profile)
    model.store.check()
    assert model.store.free_tokens == free


@pytest.mark.parametrize(
    ("row_s", "sizes"), [(0.001, 6), (0.1, 6), (0.2, 5), (1.5, 1)], ids=["quick", "loaded", "slow", "very slow"]
)
def test_a_loaded_node_measures_trees_too(row_s: float, sizes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients would believe that trees cost no more than single rows."""
    clock = [0.0]

    def pass_forward(runner: object, served: object, store: object, rows: int) -> float:
        seconds = row_s * (1 + rows / 25)  # a third of SmolLM2-135M
        clock[0] += seconds
        return seconds

    monkeypatch.setattr(latency_profile, "_time_forward", pass_forward)
    monkeypatch.setattr(latency_profile, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    store = SimpleNamespace(free_tokens=2048)
    profile = measure_profile(None, None, store)  # type: ignore[arg-type]
    assert [rows for rows, _ in profile] == list(SIZES[:sizes])
    assert clock[0] < max(LONGEST_S, 6 * row_s)


def test_profile_of_a_part_scales_with_its_blocks() -> None:
    assert scale_profile(((1, 100), (16, 250)), Span(2, 4), Span(0, 8)) == ((1, 25), (16, 62))
    assert scale_profile(((1, 1),), Span(0, 1), Span(0, 8)) == ((1, 1),)
