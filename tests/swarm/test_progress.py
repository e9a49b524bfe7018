"""Test that downloads report their progress, with the hub's own client and a stand-in for the hub."""

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


class HubStandIn(BaseHTTPRequestHandler):
    """Serves one repository and its files."""

    def do_HEAD(self) -> None:  # The name is prescribed by http.server.
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        """Send status and headers, and return the content."""
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
        """Log nothing."""


PROGRAM = """
import json
from treeswarm.model_files import resolve_model
reports = []
folder = resolve_model("some/model", weights=True, progress=lambda *report: reports.append(report))
print(json.dumps([reports, (folder / "model.safetensors").stat().st_size]))
"""


def test_download_reports_its_bytes(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), HubStandIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # The hub's client reads its endpoint when it is imported, so it needs a process of its own.
        environ = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*",
        }  # fmt: skip
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, timeout=120, check=False
        )
        server.shutdown()
    assert process.returncode == 0, process.stderr
    reports, size = json.loads(process.stdout)
    assert size == len(WEIGHTS)
    assert reports[-1] == [len(WEIGHTS), len(WEIGHTS), "downloading"]
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)
