"""A client downloads the beginning of a GGUF file on the hub, and a node the tensors of its span."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tests.support.gguf_models import write_gguf
from tests.support.local_hub import LocalHub, Repository, local_hub

from treeswarm.errors import ModelError
from treeswarm.identity import weights_digest
from treeswarm.model_files import check_model_name, is_at_hand, read_config, resolve_model
from treeswarm.model_sources import conversion_process, gguf_files, hub_gguf
from treeswarm.model_sources.gguf_files import WEIGHTS
from treeswarm.protocol.spans import Span
from treeswarm_node.model.checkpoint.loader import load_span

FILE = "quants/tiny-Q8_0.gguf"
NAME = f"org/repo:{FILE}"


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write_gguf(tmp_path / "tiny.gguf").read_bytes()


@pytest.fixture
def hub(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    def convert(kind: str, source: Path, target: Path) -> None:
        try:
            conversion_process.convert_gguf(source, target)
        except conversion_process.ConversionError as error:
            raise ModelError(str(error)) from None

    monkeypatch.setattr(gguf_files, "convert", convert)
    monkeypatch.setattr(hub_gguf, "convert", convert)
    monkeypatch.setattr(hub_gguf, "BEGINNING", 4096)  # less than the vocabulary takes
    monkeypatch.setattr(hub_gguf, "GAP", 0)
    with local_hub() as running:
        running.repositories["org/repo"] = Repository({FILE: content})
        running.use_here(tmp_path, monkeypatch)
        yield running


def test_client_and_node_download_what_they_need(
    hub: LocalHub, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_model_name(NAME)
    assert not is_at_hand(NAME)
    folder = resolve_model(NAME)
    beginning = hub.bytes_of(FILE)
    assert beginning < len(content) / 4
    local = resolve_model(str(tmp_path / "tiny.gguf"))
    assert read_config(folder) == read_config(local)
    assert weights_digest(folder, read_config(folder)) == weights_digest(local, read_config(local))

    resolve_model(NAME, weights=True, span=Span(0, 1))
    assert hub.bytes_of(FILE) < 0.7 * len(content)
    ours, theirs = (load_span(path, Span(0, 1), torch.float32, torch.device("cpu")) for path in (folder, local))
    for name, tensor in theirs.skeleton.base_model.layers[0].state_dict().items():
        assert torch.equal(tensor, ours.skeleton.base_model.layers[0].state_dict()[name])

    before = hub.bytes_of(FILE)
    resolve_model(NAME, weights=True, span=Span(0, 1))
    assert hub.bytes_of(FILE) == before
    resolve_model(NAME, weights=True)
    assert (folder / WEIGHTS).read_bytes() == content
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(NAME, weights=True) == folder


def test_missing_files_and_no_network_are_explained(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"has no file 'absent\.gguf' on the hub"):
        resolve_model("org/repo:absent.gguf")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="fetch it while online"):
        resolve_model(NAME)


def test_download_that_breaks_off_goes_on_at_the_next_start(
    hub: LocalHub, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's client waits before it tries again
    monkeypatch.setattr(hub_gguf, "CHUNK", len(content) // 8)
    folder = resolve_model(NAME)
    hub.break_after = [len(content) // 8, *[100] * 6]  # one piece arrives, the next one breaks off in every attempt
    before = hub.bytes_of(FILE)
    with pytest.raises(ModelError, match=r"cannot download http.*quants/tiny-Q8_0\.gguf .*: check the network"):
        resolve_model(NAME, weights=True)
    assert not hub.break_after
    resolve_model(NAME, weights=True)
    assert (folder / WEIGHTS).read_bytes() == content
    assert hub.bytes_of(FILE) - before < len(content) + 600  # no whole piece came twice
