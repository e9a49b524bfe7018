"""Ask a process of its own to convert a model's small files with transformers, which this program never imports."""

import json
import subprocess
import sys
from pathlib import Path

from treeswarm.errors import ModelError
from treeswarm.model_sources import conversion_process


def convert(kind: str, source: Path, target: Path) -> None:
    """Convert `source` into the existing folder `target`: of a `gguf` file all but weights, or a `tokenizer`.

    Raises ModelError with the reason.
    """
    finished = subprocess.run(
        [sys.executable, conversion_process.__file__, kind, str(source), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode == 0:
        return
    try:
        reason = str(json.loads(finished.stdout)["error"])
    except (ValueError, KeyError, TypeError):
        lines = finished.stderr.strip().splitlines() or [f"the converter ended with status {finished.returncode}"]
        reason = lines[-1]
    raise ModelError(f"'{source}' cannot be used: {reason}")
