"""The hub's own client fetches from a hub on loopback what a node needs and no more, and failures are explained."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tests.node.conftest import tiny_model
from tests.support.local_hub import COMMIT, TOKEN, LocalHub, Repository, local_hub

from treeswarm.errors import ModelError
from treeswarm.identity import weights_digest
from treeswarm.model_files import INDEX, HubOptions, read_config, resolve_model, weight_files
from treeswarm.programs.devices import Machine
from treeswarm.protocol.spans import Span
from treeswarm_node.config import DeviceConfig, ModelConfig, NodeConfig
from treeswarm_node.dry_run.appraisal import Appraisal, appraise
from treeswarm_node.model.checkpoint.headers import AT_HUB
from treeswarm_node.model.checkpoint.loader import load_span

HEADER_BYTES = 100_001
"""Number of bytes that the hub's client reads of a file at most to get its header, if that is small."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose files are larger than what the hub's client reads for their headers."""
    folder = tmp_path_factory.mktemp("published")
    tiny_model("llama", hidden_size=128, intermediate_size=384).save_pretrained(folder, max_shard_size="600KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def hub(tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with local_hub() as running:
        running.add_folder("org/model", published)
        running.add_folder("org/gated", published, is_gated=True)
        running.use_here(tmp_path, monkeypatch)
        yield running


def look_at(name: str) -> Appraisal:
    return appraise(NodeConfig(ModelConfig(name), DeviceConfig("cpu", memory=1 << 30)), Machine())


def test_client_gets_small_files_and_node_those_of_its_span(hub: LocalHub, published: Path) -> None:
    folder = resolve_model("org/model")
    assert folder.name == COMMIT
    assert hub.sent == {path.name for path in published.glob("*.json")}

    resolve_model("org/model", weights=True, span=Span(1, 3))
    wanted = {
        file
        for file, tensors in weight_files(published).items()
        for tensor in tensors
        if ".layers." not in tensor or ".layers.1." in tensor or ".layers.2." in tensor
    }
    fetched = {file for file in hub.sent if file.endswith(".safetensors")}
    assert fetched == wanted < set(weight_files(published))
    for file in fetched:
        assert hub.bytes_of(file) == (published / file).stat().st_size
    assert not any(request.authorized for request in hub.requests)
    load_span(folder, Span(1, 3), torch.float32, torch.device("cpu"))
    # the digest covers files that are not here, whose SHA-256 the hub says
    assert weights_digest(folder, read_config(folder)) == weights_digest(published, read_config(published))

    before = list(hub.requests)
    assert resolve_model("org/model", weights=True, span=Span(1, 3)) == folder
    assert hub.requests == before


def test_dry_run_reads_headers_alone(hub: LocalHub, published: Path) -> None:
    appraisal = look_at("org/model")
    assert appraisal.source == AT_HUB
    assert appraisal.sizes == look_at(str(published)).sizes
    sizes = {path.name: path.stat().st_size for path in published.glob("*.safetensors")}
    for file, size in sizes.items():
        assert hub.bytes_of(file) <= HEADER_BYTES < size
    assert not list(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_download_goes_on_where_it_broke_off(hub: LocalHub, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's client waits before it tries again
    chunk = 1 << 16
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    hub.break_after = [3 * chunk, 4 * chunk]
    folder = resolve_model("org/model", weights=True)
    for path in published.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert not hub.break_after
    sent = sum(request.bytes_sent for request in hub.requests if request.file.endswith(".safetensors"))
    size = sum(path.stat().st_size for path in published.glob("*.safetensors"))
    assert size <= sent <= size + 2 * chunk


@pytest.mark.parametrize("token", [None, "hf_of_someone"], ids=["no token", "token without access"])
def test_gated_model_says_where_to_ask(hub: LocalHub, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    expected = (
        f"'org/gated' is gated on the hub: accept its terms at {hub.url}/org/gated, then log in with `hf auth login`"
    )
    for use in (lambda: resolve_model("org/gated"), lambda: look_at("org/gated")):
        with pytest.raises(ModelError) as refusal:
            use()
        assert str(refusal.value).startswith(expected)
        assert "\n" not in str(refusal.value)
    assert not hub.sent


def test_token_of_an_account_with_access_opens_a_gated_model(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    resolve_model("org/gated", weights=True, span=Span(0, 1))
    assert look_at("org/gated").source == AT_HUB
    assert not any(request.authorized for request in hub.requests)  # the host of large files is not shown the token


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("org/absent", None, r"the hub has no model 'org/absent', or it is private: check the name, or log in"),
        ("org/model", "v9", r"'org/model' has no revision 'v9' on the hub: give a branch, tag or commit"),
        ("org/bin", None, r"'org/bin' has no complete weights as safetensors on the hub, and \.bin files are never"),
        ("org/half", None, r"'org/half' has no complete weights as safetensors on the hub"),
        ("org/model:absent.gguf", None, r"'org/model' has no file 'absent\.gguf' on the hub: look for it at http"),
        ("org/absent:tiny.gguf", None, r"the hub has no model 'org/absent', or it is private"),
        ("org/gated:tiny.gguf", None, r"'org/gated' is gated on the hub: accept its terms at http"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    hub: LocalHub, published: Path, name: str, revision: str | None, message: str
) -> None:
    files = {path.name: path.read_bytes() for path in published.iterdir()}
    small = {file: content for file, content in files.items() if file.endswith(".json") and file != INDEX}
    hub.repositories["org/bin"] = Repository(small | {"pytorch_model.bin": b"x"})
    last = max(file for file in files if file.endswith(".safetensors"))
    hub.repositories["org/half"] = Repository({file: content for file, content in files.items() if file != last})
    with pytest.raises(ModelError, match=f"^{message}") as refusal:
        resolve_model(name, weights=True, hub=HubOptions(revision))
    assert "\n" not in str(refusal.value)


def test_dry_run_of_a_repository_without_safetensors_is_refused(hub: LocalHub, published: Path) -> None:
    hub.repositories["org/bin"] = Repository({"config.json": (published / "config.json").read_bytes(), "a.bin": b"x"})
    appraisal = look_at("org/bin")
    assert appraisal.refusal is not None
    assert "'org/bin' has no complete weights as safetensors on the hub" in appraisal.refusal


def test_no_network_is_said_and_what_is_cached_is_used(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("org/model", weights=True)
    for name, value in (("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_ETAG_TIMEOUT", 1)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    assert resolve_model("org/model", weights=True) == folder
    with pytest.raises(ModelError, match=r"cannot get 'org/other' from the hub \(.*: check the name and the network"):
        resolve_model("org/other")


@pytest.mark.slow
def test_programs_follow_the_variables_of_the_hubs_client(hub: LocalHub, tmp_path: Path) -> None:
    """The real command line reads the hub's address, token and cache from the environment."""
    command = [sys.executable, "-m", "treeswarm_node.cli.main", "org/gated", "--dry-run", "--json", "--device", "cpu"]
    environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["read_from"] == AT_HUB
