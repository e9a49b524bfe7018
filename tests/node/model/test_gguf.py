"""GGUF files load as stock transformers loads them, span by span."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.node.conftest import SpanChain, append_of
from tests.support.gguf_models import BLOCKS, TOKENS, write_gguf

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.identity import config_digest, weights_digest
from treeswarm.model_files import load_tokenizer, read_config, read_shape, resolve_model
from treeswarm.model_sources import conversion_process, gguf_files
from treeswarm.protocol.spans import Span
from treeswarm_client.prompt_encoder import load_prompt_encoder
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.footprint import read_footprint
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")
WHOLE = Span(0, BLOCKS)


@pytest.fixture(autouse=True)
def conversion_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Convert without a process of its own, which imports transformers again for every file."""

    def convert(kind: str, source: Path, target: Path) -> None:
        try:
            conversion_process.convert_gguf(source, target)
        except conversion_process.ConversionError as error:
            raise ModelError(str(error)) from None

    monkeypatch.setattr(gguf_files, "convert", convert)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stock(file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "F32"), ("llama", "F16"), ("llama", "BF16"), ("llama", "Q4_0"), ("llama", "Q4_1"), ("llama", "Q8_0"),
        ("llama", "Q4_K"), ("llama", "Q6_K"), ("qwen2", "Q8_0"), ("qwen3moe", "Q4_0"),
    ],
)  # fmt: skip
def test_weights_are_stock_transformers_own(tmp_path: Path, architecture: str, kind: str) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", architecture=architecture, kind=kind)
    folder = resolve_model(str(file))
    loaded = load_span(folder, WHOLE, torch.float32, CPU)
    expected = stock(file).state_dict()
    assert loaded.skeleton.state_dict().keys() == expected.keys()
    for name, tensor in loaded.skeleton.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_experts_of_any_width_load(tmp_path: Path) -> None:
    # transformers itself takes every model of this architecture for one with experts 768 wide
    file = write_gguf(tmp_path / "tiny.gguf", architecture="qwen3moe", expert_width=256, kind="F16")
    loaded = load_span(resolve_model(str(file)), WHOLE, torch.float32, CPU)
    assert loaded.config.moe_intermediate_size == 256
    assert loaded.config.head_dim == 64


def test_spans_compute_what_stock_transformers_computes(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", kind="Q4_1")
    folder = resolve_model(str(file))
    chain = SpanChain(
        [SpanModel(load_span(folder, span, torch.float32, CPU), 512) for span in (Span(0, 1), Span(1, 2))]
    )
    for model in chain.models:
        check_family(model)
    head = chain.models[0].loaded.skeleton
    assert head.base_model.layers[1].self_attn.q_proj.weight.is_meta  # only the span was read
    tokens = [1, 40, 41, 42, 7, 99]
    chain.open("prompt", 32)
    logits = chain.run({"prompt": append_of(0, 1, range(6), tokens, prefill=True)})["prompt"]
    with torch.no_grad():
        expected = stock(file)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_config_and_tokenizer_are_stock_transformers_own(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    file = write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.eot_token_id": 1})
    folder = resolve_model(str(file))
    ours = AutoConfig.from_pretrained(folder).to_dict()
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf").to_dict()
    names = {"_name_or_path", "_model_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in names} == {k: v for k, v in theirs.items() if k not in names}
    assert read_shape(folder).vocab_size == len(TOKENS)
    assert read_shape(folder).eos_ids == {1, 2}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    messages = [{"role": "user", "content": "in the  thing 42 ü"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert load_tokenizer(folder).encode(text).ids == tokenizer(text)["input_ids"]
    assert load_prompt_encoder("tiny", folder).encode_chat(messages) == tokenizer(text)["input_ids"]


def test_one_file_has_one_digest_wherever_it_lies(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "other").mkdir()
    second = tmp_path / "other" / "renamed.gguf"
    second.write_bytes(first.read_bytes())
    folders = [resolve_model(str(file)) for file in (first, second)]
    assert len({config_digest(read_config(folder)) for folder in folders}) == 1
    assert len({weights_digest(folder, read_config(folder)) for folder in folders}) == 1
    other = resolve_model(str(write_gguf(tmp_path / "q4.gguf", kind="Q4_0")))
    assert weights_digest(other, read_config(other)) != weights_digest(folders[0], read_config(folders[0]))


def test_nothing_is_expanded_on_disk(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    folder = resolve_model(str(file))
    assert (folder / gguf_files.WEIGHTS).resolve() == file.resolve()
    small = [path for path in folder.iterdir() if not path.is_symlink()]
    assert sum(path.stat().st_size for path in small) < file.stat().st_size / 10
    footprint = read_footprint(build_skeleton(folder, torch.float32), torch.float32, "none", "cpu")
    assert footprint.block == 4 * (4 * 256 * 256 + 2 * 128 * 256 + 256 * 256 + 2 * 256)


def test_llama3_rope_factors_become_the_config(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width = 64
    plain = 10000.0 ** -(np.arange(0, width, 2) / width)
    wanted = {"rope_type": "llama3", "factor": 32.0, **conversion_process.LLAMA3_ROPE, "rope_theta": 10000.0}
    config = AutoConfig.for_model("llama", hidden_size=256, num_attention_heads=4, rope_parameters=wanted)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    factors = (plain / scaled.numpy()).astype(np.float32)
    file = write_gguf(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": factors})
    folder = resolve_model(str(file))
    parameters = AutoConfig.from_pretrained(folder).rope_parameters
    assert {key: parameters[key] for key in wanted} == wanted
    load_span(folder, WHOLE, torch.float32, CPU)
    with pytest.raises(ModelError, match="not those of Llama 3"):
        resolve_model(str(write_gguf(tmp_path / "odd.gguf", extra={"rope_freqs.weight": factors[::-1].copy()})))


@pytest.mark.parametrize(
    ("name", "value"), [("llama.rope.scaling.type", "yarn"), ("llama.logit_scale", 0.25), ("llama.expert_count", 8)]
)
def test_what_transformers_does_not_read_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", metadata={name: value})
    with pytest.raises(ModelError, match=name):
        resolve_model(str(file))


def test_unusable_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gguf").write_text("no model")
    split = write_gguf(tmp_path / "split.gguf", metadata={"split.count": 3})
    unknown = write_gguf(tmp_path / "unknown.gguf", architecture="command-r")
    for file, reason in (
        (tmp_path / "cut.gguf", "no whole GGUF file"),
        (tmp_path / "text.gguf", "no whole GGUF file"),
        (tmp_path / "absent.gguf", "there is no GGUF file"),
        (split, "one of several parts"),
        (unknown, "does not read GGUF files of architecture 'command-r'"),
    ):
        with pytest.raises(ModelError, match=reason):
            resolve_model(str(file))


def test_tensors_of_no_parameter_are_refused(tmp_path: Path) -> None:
    extra = {"blk.0.attn_q.scale": np.ones(4, np.float32)}
    folder = resolve_model(str(write_gguf(tmp_path / "tiny.gguf", extra=extra)))
    with pytest.raises(UnsupportedModel, match=r"attn_q\.scale"):
        load_span(folder, WHOLE, torch.float32, CPU)


def test_a_client_without_torch_gets_the_same_small_files(tmp_path: Path) -> None:
    file, target = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "without-torch"
    target.mkdir()
    program = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, conversion_process.__file__, "gguf", str(file), str(target)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    folder = resolve_model(str(file))
    for path in sorted(target.iterdir()):
        assert path.read_text() == (folder / path.name).read_text()
    assert {path.name for path in folder.iterdir()} == {path.name for path in target.iterdir()} | {gguf_files.WEIGHTS}
