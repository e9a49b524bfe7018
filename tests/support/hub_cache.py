"""Put models into a folder laid out like the cache of huggingface_hub."""

import shutil
from pathlib import Path

from treeswarm.model_files import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add_to_cache(home: Path, name: str, bundled: str, *, ref: str = "main") -> None:
    """Store a bundled model under a hub id, at one branch or tag."""
    folder = home / f"models--{name.replace('/', '--')}"
    shutil.copytree(resolve_model(bundled), folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / ref).write_text(COMMIT)
