"""Models as huggingface_hub keeps them."""

import shutil
from pathlib import Path

from treeswarm.model_files import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home: Path, name: str, bundled: str, *, ref: str = "main") -> None:
    """A bundled model under a hub id, at one branch or tag."""
    folder = home / f"models--{name.replace('/', '--')}"
    shutil.copytree(resolve_model(bundled), folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / ref).write_text(COMMIT)
