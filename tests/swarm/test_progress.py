"""Downloads tell how far they are: the hub's own client, against a stand-in for the hub."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789" * 4
WEIGHTS = bytes(range(256)) * 8192
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}


class StandIn(BaseHTTPRequestHandler):
    """Tells of one repository, and gives its files."""

    def do_HEAD(self) -> None:  # the server's name for it
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        path, name = self.path.partition("?")[0], self.path.rpartition("/")[2]
        content, headers = b"", dict[str, str]()
        if path.startswith("/api/models/some/model/tree"):
            tree = [{"type": "file", "path": f, "size": len(c), "oid": f"{len(c):040}"} for f, c in FILES.items()]
            content = json.dumps(tree).encode()
        elif path.startswith("/api/models/some/model"):
            files = [{"rfilename": file} for file in FILES]
            content = json.dumps({"id": "some/model", "sha": COMMIT, "siblings": files}).encode()
        elif path.startswith("/some/model/resolve/") and name in FILES:
            content = FILES[name]
            headers = {"ETag": f'"{len(content):040}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self.send_response(200 if content else 404)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        return content

    def log_message(self, *args: object) -> None:
        """Nothing."""


PROGRAM = """
import json
from treeswarm.model_files import resolve_model
told = []
folder = resolve_model("some/model", weights=True, progress=lambda *how: told.append(how))
print(json.dumps([told, (folder / "model.safetensors").stat().st_size]))
"""


def test_a_download_tells_its_bytes(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # The hub's client reads its endpoint when it is imported: in a process of its own.
        environ = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*",
        }  # fmt: skip
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, timeout=120, check=False
        )
        server.shutdown()
    assert ran.returncode == 0, ran.stderr
    told, size = json.loads(ran.stdout)
    assert size == len(WEIGHTS)
    assert told[-1] == [len(WEIGHTS), len(WEIGHTS), "downloading"]
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
