"""The weights of a loaded span are compared with those that transformers itself loads from the same checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.node.model.test_completeness import BIAS, MOE, save_tiny

from treeswarm.errors import UnsupportedModel
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check import weights
from treeswarm_node.model.check.weights import check_weights
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.loaded_span import LoadedSpan
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("span", [Span(0, 2), Span(1, 3), Span(2, 4)], ids=str)
def test_weights_are_those_of_transformers(tmp_path: Path, span: Span, dtype: torch.dtype) -> None:
    save_tiny(tmp_path, "glm4_moe", **MOE)
    model = SpanModel(load_span(tmp_path, span, dtype, CPU), 256)
    assert check_weights(model) >= 10


@pytest.mark.parametrize("kind", ["int8"])
def test_quantized_weights_are_near_those_of_transformers(tmp_path: Path, kind: str) -> None:
    save_tiny(tmp_path, "llama", hidden_size=128, intermediate_size=256, head_dim=32)
    model = SpanModel(load_span(tmp_path, Span(1, 3), torch.float32, CPU, quantization=kind), 256)
    assert check_weights(model) == 9


def _zero_bias(loaded: LoadedSpan) -> None:
    loaded.skeleton.get_buffer(BIAS).zero_()


def _scale(name: str) -> Callable[[LoadedSpan], object]:
    return lambda loaded: loaded.skeleton.get_parameter(name).data.mul_(1.01)


PLANTED: dict[str, tuple[Span, Callable[[LoadedSpan], object], str]] = {
    "a buffer left at zero": (Span(1, 3), _zero_bias, BIAS),
    "a scale dropped": (Span(1, 3), _scale("model.layers.1.mlp.shared_experts.up_proj.weight"), "shared_experts.up_p"),
    "an embedding's scale": (Span(0, 1), _scale("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "a head's scale": (Span(3, 4), _scale("lm_head.weight"), "lm_head.weight"),
    "a final norm": (Span(3, 4), _scale("model.norm.weight"), "model.norm.weight"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_mistake_in_loaded_weights_is_refused(tmp_path: Path, planted: str) -> None:
    span, spoil, name = PLANTED[planted]
    save_tiny(tmp_path, "glm4_moe", **MOE)
    loaded = load_span(tmp_path, span, torch.float32, CPU)
    model = SpanModel(loaded, 256)
    with torch.no_grad():
        spoil(loaded)
    with pytest.raises(UnsupportedModel, match=f"'glm4_moe' are not supported: tensor .*{name}.* is not what"):
        check_weights(model)


def test_weights_that_cannot_be_compared_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    model = SpanModel(load_span(tmp_path, Span(1, 2), torch.float32, CPU), 256)

    def fail(*_: object) -> None:
        raise ValueError("this constructor needs all blocks\nsecond line")

    monkeypatch.setattr(weights, "load_slice", fail)
    with pytest.raises(UnsupportedModel, match=r"does not load block 1 alone, .* \(ValueError: .* needs all blocks\)$"):
        check_weights(model)
