"""A client downloads the beginning of a GGUF file on the hub, and a node the tensors of its span."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tests.support.gguf_models import write_gguf

from treeswarm.errors import ModelError
from treeswarm.identity import weights_digest
from treeswarm.model_files import check_model_name, is_at_hand, read_config, resolve_model
from treeswarm.model_sources import conversion_process, gguf_files, hub_gguf
from treeswarm.model_sources.gguf_files import WEIGHTS
from treeswarm.protocol.spans import Span
from treeswarm_node.model.checkpoint.loader import load_span

NAME = "org/repo:quants/tiny-Q8_0.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves one file as the hub does, and counts the bytes that it sends."""

    content: bytes
    sent: list[int] = field(default_factory=list)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                known = self.path.startswith("/org/repo/resolve/") and self.path.endswith("tiny-Q8_0.gguf")
                self.send_response(200 if known else 404)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("X-Linked-Etag", f'"{hashlib.sha256(hub.content).hexdigest()}"')
                self.send_header("X-Linked-Size", str(len(hub.content)))
                self.end_headers()

            def do_GET(self) -> None:
                if f"/resolve/{COMMIT}/" not in self.path:  # the content of a commit never changes
                    self.send_error(404)
                    return
                first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                part = hub.content[first : last + 1]
                hub.sent.append(len(part))
                self.send_response(206)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    def convert(kind: str, source: Path, target: Path) -> None:
        try:
            conversion_process.convert_gguf(source, target)
        except conversion_process.ConversionError as error:
            raise ModelError(str(error)) from None

    fake = FakeHub(write_gguf(tmp_path / "tiny.gguf").read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), fake.handler())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(gguf_files, "convert", convert)
    monkeypatch.setattr(hub_gguf, "convert", convert)
    monkeypatch.setattr(hub_gguf, "BEGINNING", 4096)  # less than the vocabulary takes
    monkeypatch.setattr(hub_gguf, "GAP", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


def test_client_and_node_download_what_they_need(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_model_name(NAME)
    assert not is_at_hand(NAME)
    folder = resolve_model(NAME)
    beginning = sum(hub.sent)
    assert beginning < len(hub.content) / 4
    local = resolve_model(str(tmp_path / "tiny.gguf"))
    assert read_config(folder) == read_config(local)
    assert weights_digest(folder, read_config(folder)) == weights_digest(local, read_config(local))

    resolve_model(NAME, weights=True, span=Span(0, 1))
    assert sum(hub.sent) < 0.7 * len(hub.content)
    ours, theirs = (load_span(path, Span(0, 1), torch.float32, torch.device("cpu")) for path in (folder, local))
    for name, tensor in theirs.skeleton.base_model.layers[0].state_dict().items():
        assert torch.equal(tensor, ours.skeleton.base_model.layers[0].state_dict()[name])

    before = sum(hub.sent)
    resolve_model(NAME, weights=True, span=Span(0, 1))
    assert sum(hub.sent) == before
    resolve_model(NAME, weights=True)
    assert (folder / WEIGHTS).read_bytes() == hub.content
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(NAME, weights=True) == folder


def test_missing_files_and_no_network_are_explained(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="check the name and the network"):
        resolve_model("org/repo:absent.gguf")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="fetch it while online"):
        resolve_model(NAME)
