"""Test that downloads report their progress, with the hub's own client and a hub on loopback."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.local_hub import Repository, local_hub

WEIGHTS = bytes(range(256)) * 8192
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}

PROGRAM = """
import json
from treeswarm.model_files import resolve_model
reports = []
folder = resolve_model("some/model", weights=True, progress=lambda *report: reports.append(report))
print(json.dumps([reports, (folder / "model.safetensors").stat().st_size]))
"""


def test_download_reports_its_bytes(tmp_path: Path) -> None:
    with local_hub() as hub:
        hub.repositories["some/model"] = Repository(FILES)
        # The hub's client reads its endpoint when it is imported, so it needs a process of its own.
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=hub.environment(tmp_path), capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr
    reports, size = json.loads(process.stdout)
    assert size == len(WEIGHTS)
    assert reports[-1] == [len(WEIGHTS), len(WEIGHTS), "downloading"]
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)
