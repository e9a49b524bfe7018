"""Test that the committed protobuf code matches `proto/treeswarm.proto`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_generated_code_is_up_to_date() -> None:
    process = subprocess.run(
        [sys.executable, ROOT / "proto" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
