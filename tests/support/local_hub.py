"""A hub on this machine's loopback, which speaks the part of the hub's protocol that `huggingface_hub` uses to read.

It answers about repositories and their files, with the hub's headers and error codes.  Large files are redirected to
another host, as the hub does, and both answer requests for ranges of bytes.  Every request is noted.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".gguf", ".bin", ".model")
"""Ends of the names of files that the hub keeps apart from the repository."""
TOKEN = "hf_granted"
"""Token of an account that may read gated repositories."""


@dataclass(frozen=True)
class Repository:
    """Holds the files of a model by name."""

    files: Mapping[str, bytes]
    is_gated: bool = False
    """Whether only the account of `TOKEN` may read files; every client may ask about a gated repository."""


@dataclass(frozen=True)
class HubRequest:
    """Describes one request for a file's content."""

    repository: str
    file: str
    bytes_sent: int
    authorized: bool
    """Whether the host that keeps large files was shown a token."""


@dataclass(eq=False)
class LocalHub:
    """A running hub; repositories may be added at any time."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[HubRequest] = field(default_factory=list)
    break_after: list[int] = field(default_factory=list)
    """Numbers of bytes after which the next answers with a large file's content break off, in this order."""

    def add_folder(self, name: str, folder: Path, *, is_gated: bool = False) -> None:
        """Publish the files of a folder."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repositories[name] = Repository(files, is_gated)

    def bytes_of(self, file: str) -> int:
        """Return how many bytes of a file were sent."""
        return sum(request.bytes_sent for request in self.requests if request.file == file)

    @property
    def sent(self) -> set[str]:
        """Names of the files of which something was sent."""
        return {request.file for request in self.requests if request.bytes_sent}

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a program that uses this hub, and keeps what it fetches in `home`."""
        dropped = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE")
        return {key: value for key, value in os.environ.items() if key not in dropped} | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        }

    def use_here(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process use this hub: the client has read its environment when it was imported."""
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        huggingface_hub.close_session()


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Run a hub."""
    hub = LocalHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def do_HEAD(self) -> None:  # The names are prescribed by http.server.
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Log nothing: the hub notes requests."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        parts = url.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[4:], parse_qs(url.query))
        elif parts[0] == "large":
            self._send_large(parts[1], parts[2], "/".join(parts[3:]))
        elif "resolve" in parts:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "", "Not found")

    def _describe(self, name: str, rest: list[str], query: Mapping[str, Any]) -> None:
        """Answer about a repository, or about the tree of its files."""
        repository = self.hub.repositories.get(name)
        revision = rest[1] if len(rest) > 1 else "main"
        if repository is None:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif rest[:1] == ["tree"]:
            self._send_json([_tree_entry(file, content) for file, content in repository.files.items()])
        else:
            siblings = [_sibling(file, content, "blobs" in query) for file, content in repository.files.items()]
            self._send_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        """Answer with a small file, or with the place of a large one."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
        elif repository.is_gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 403 if self.headers["Authorization"] else 401
            self._refuse(status, "GatedRepo", f"Access to model {name} is restricted. You must have access to it.")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif file not in repository.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            content, headers = repository.files[file], {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if file.endswith(LARGE):
                place = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/large/{name}/{file}"
                headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
                self._send(302, headers | {"Location": place, "ETag": f'"{_blob_id(content)}"'})
            else:
                self._send_content(name, file, headers | {"ETag": f'"{_blob_id(content)}"'})

    def _send_large(self, organization: str, model: str, file: str) -> None:
        name = f"{organization}/{model}"
        self._send_content(name, file, {"ETag": f'"{_sha256(self.hub.repositories[name].files[file])}"'}, large=True)

    def _send_content(self, name: str, file: str, headers: dict[str, str], *, large: bool = False) -> None:
        """Send a file or a range of its bytes, or the beginning of that if the answer is to break off."""
        content, wanted = self.hub.repositories[name].files[file], self.headers["Range"]
        part, status = content, 200
        if wanted is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part, status = content[int(first) : int(last) + 1 if last else None], 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        breaks = large and self.command == "GET" and bool(self.hub.break_after)
        sent = part[: self.hub.break_after.pop(0)] if breaks else part
        if self.command == "GET":
            shown = large and self.headers["Authorization"] is not None
            self.hub.requests.append(HubRequest(name, file, len(sent), shown))
        self._send(status, headers, sent, length=len(part))

    def _send_json(self, content: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": message}, json.dumps({"error": message}).encode())

    def _send(self, status: int, headers: Mapping[str, str], content: bytes = b"", length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _large(content: bytes, digest: str) -> dict[str, Any]:
    return {digest: _sha256(content), "size": len(content), "pointerSize": 134}


def _tree_entry(file: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": file, "size": len(content), "oid": _blob_id(content)}
    return entry | ({"lfs": _large(content, "oid")} if file.endswith(LARGE) else {})


def _sibling(file: str, content: bytes, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": file}
    entry = {"rfilename": file, "size": len(content), "blobId": _blob_id(content)}
    return entry | ({"lfs": _large(content, "sha256")} if file.endswith(LARGE) else {})
