"""A wider model has the logits, text and files of the original; models that cannot be widened are refused."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from tests.client.drafters.conftest import tiny_model
from transformers import AutoModelForCausalLM

from treeswarm.errors import BadRequest, ModelError, UnsupportedModel
from treeswarm.model_files import CLIENT_FILES, read_header, read_shape, resolve_model, tokenizer_digest
from treeswarm.programs.units import format_bytes
from treeswarm_bench import cli
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.widened_model import widen, widened_model

DEMO = resolve_model("demo")


def load(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wider")
    widen(DEMO, folder, 3)
    return folder


@pytest.mark.filterwarnings("ignore:.*generation flags.*")
def test_wide_model_has_the_narrow_models_logits_and_text(wider: Path) -> None:
    narrow, wide = load(DEMO), load(wider)
    growth = sum(p.numel() for p in wide.parameters()) / sum(p.numel() for p in narrow.parameters())
    assert growth > 2.0, "more than half of the six million weights are in feed-forwards"
    prompt = torch.randint(1, 4096, (1, 48), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(wide(prompt).logits, narrow(prompt).logits, rtol=1e-4, atol=1e-4)
    texts = [model.generate(prompt, do_sample=False, min_new_tokens=24, max_new_tokens=24) for model in (narrow, wide)]
    assert torch.equal(*texts)


def test_new_neurons_are_not_zeros_that_a_processor_may_skip(wider: Path) -> None:
    for layer in load(wider).get_submodule("model.layers"):
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            assert part.weight[576:].shape == (2 * 576, 256)
            assert (part.weight[576:] != 0).float().mean() > 0.99
            assert 0.015 < part.weight[576:].std() < 0.025
        assert not layer.mlp.down_proj.weight[:, 576:].any()


def test_copy_has_the_files_and_tensors_of_the_model(wider: Path) -> None:
    assert tokenizer_digest(wider) == tokenizer_digest(DEMO)
    config = json.loads((wider / "config.json").read_text())
    assert config == json.loads((DEMO / "config.json").read_text()) | {"intermediate_size": 3 * 576}
    copied = {path.name for pattern in CLIENT_FILES for path in DEMO.glob(pattern)}
    assert {path.name for path in wider.iterdir()} == copied | {"model.safetensors"}
    headers = [read_header(folder / "model.safetensors") for folder in (DEMO, wider)]
    assert headers[0].keys() == headers[1].keys()
    assert {t["dtype"] for name, t in headers[1].items() if name != "__metadata__"} == {"BF16"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_and_several_checkpoint_files(tmp_path: Path, dtype: torch.dtype) -> None:
    source, folder = tmp_path / "source", tmp_path / "wider"
    folder.mkdir()
    tiny_model().to(dtype).save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    count = widen(source, folder, 2)
    narrow, wide = load(source), load(folder)
    assert count == sum(p.numel() for p in wide.get_submodule("model.layers").parameters())
    text = torch.arange(1, 20)[None]
    torch.testing.assert_close(wide(text).logits, narrow(text).logits, rtol=1e-4, atol=1e-4)
    header = read_header(folder / "model.safetensors")
    stored = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {stored}


def test_widening_once_keeps_every_tensor(tmp_path: Path) -> None:
    widen(DEMO, tmp_path, 1)
    before, after = load(DEMO).state_dict(), load(tmp_path).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}, "some of its blocks lack them"),
        ("phi3", {}, "gate_up_proj.weight"),
        ("llama", {"mlp_bias": True}, "without biases"),
    ],
)
def test_other_feed_forwards_are_refused_with_the_reason(
    tmp_path: Path, family: str, changes: dict[str, object], words: str
) -> None:
    source, folder = tmp_path / "source", tmp_path / "wider"
    folder.mkdir()
    tiny_model(family, **changes).save_pretrained(source)
    with pytest.raises(UnsupportedModel, match=words):
        widen(source, folder, 2)
    assert not list(folder.iterdir())


def test_other_dtypes_and_factor_zero_are_refused(tmp_path: Path) -> None:
    tiny_model().double().save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModel, match="F64"):
        widen(tmp_path / "source", tmp_path, 2)
    with pytest.raises(BadRequest, match="--widen 0"):
        widen(DEMO, tmp_path, 0)


def test_copy_is_removed_and_a_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with widened_model("demo", 2) as wide:
        assert wide.folder.is_dir()
        provenance = BenchSetup(model=str(wide.folder), widened=wide).model_provenance()
    assert not wide.folder.exists()
    per_block = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 2 * 576 + 2 * 256
    assert provenance == {"model": "demo", "widen": 2, "block_weights_mib": 8 * per_block * 4 / 2**20}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("treeswarm_bench.benchmarks.widened_model._write", full)
    with pytest.raises(ModelError, match="No space left on device"), widened_model("demo", 2):
        raise AssertionError


# ---------------------------------------------------------------- the flag


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> BenchSetup:
    """Return the setup that `swarm bench` with these arguments measures with."""
    setups: list[BenchSetup] = []

    async def record_setup(setup: BenchSetup, args: argparse.Namespace) -> dict[str, object]:
        read_shape(resolve_model(setup.model))  # raises where there is no model
        setups.append(setup)
        return {}

    monkeypatch.setattr(cli, "BENCHES", dict.fromkeys(("batch", "offload", "exact"), record_setup))
    parser = argparse.ArgumentParser()
    cli.add_command(parser.add_subparsers())
    args = parser.parse_args(["bench", *arguments, "--json"])
    assert args.run(args) == 0
    return setups[0]


@pytest.mark.parametrize("which", ["batch", "offload"])
def test_flag_makes_the_bench_measure_a_wider_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    setup = run(monkeypatch, which, "--widen", "2")
    assert setup.widened is not None
    assert (setup.widened.of, setup.widened.times, str(setup.widened.folder)) == ("demo", 2, setup.model)
    assert setup.nodes == {"batch": 3, "offload": 1}[which], "a node of two blocks would keep both in its two slots"
    assert not Path(setup.model).exists()
    assert format_bytes(setup.widened.file_bytes) in capsys.readouterr().err


def test_nothing_is_widened_without_the_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "batch").model_provenance() == {"model": "demo"}
    assert capsys.readouterr().err == ""


def test_other_benches_refuse_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest, match="batch and offload"):
        run(monkeypatch, "exact", "--widen", "2")
