"""Which model is it?  Digests that two strangers' machines compute alike from the same files."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from treeswarm.errors import ModelError
from treeswarm.model_files import weight_files
from treeswarm.progress import CHECKING, Progress

# Fields of config.json that change no number: names, versions, bookkeeping, how to run rather than what.
NOT_NUMERIC = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
CHUNK = 1 << 22


def config_digest(config: dict[str, Any]) -> str:
    """Hex digest of the config's numerics-relevant part."""
    relevant = {key: value for key, value in config.items() if key not in NOT_NUMERIC and value is not None}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def weights_digest(folder: Path, config: dict[str, Any], progress: Progress | None = None) -> str:
    """Hex digest of the config and the content of every weight file, so that replicas agree to the last bit.

    A file's SHA-256 is remembered in the user's cache directory until its size or time changes.  Of a hub snapshot's
    files that were not downloaded, the hub tells it.  Raises ModelError.
    """
    names = sorted(weight_files(folder))
    elsewhere = _hub_digests(folder) if not all((folder / name).exists() for name in names) else {}
    sizes = {name: _size(folder / name) for name in names if name not in elsewhere}
    total, done = sum(sizes.values()), 0
    digest = hashlib.sha256(config_digest(config).encode())
    for name in names:
        digest.update(f"\n{name} {elsewhere.get(name) or _file_digest(folder / name)}".encode())
        done += sizes.get(name, 0)
        if progress is not None:
            progress(done, total, CHECKING)
    return digest.hexdigest()


def _hub_digests(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, as the hub has them, where `folder` is a snapshot in the hub's cache; else nothing."""
    repository, snapshots, revision = folder.parts[-3:]
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return {}
    from huggingface_hub import HfApi  # noqa: PLC0415  # only for snapshots of the hub

    name = repository.removeprefix("models--").replace("--", "/")
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # the hub's client raises requests', httpx' and its own errors
        raise ModelError(
            f"cannot ask the hub which weights '{name}' has ({type(error).__name__}): only part of them is on disk; "
            "connect once, or give a local directory with all files"
        ) from error
    return {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}


def _size(path: Path) -> int:
    if not path.exists():
        raise ModelError(f"{path} is missing: the model directory is partial, download it again")
    return path.stat().st_size


def _file_digest(path: Path) -> str:
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
    remembered = _cache_folder() / key
    if remembered.exists():
        return remembered.read_text("ascii")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(digest.hexdigest(), "ascii")
    except OSError:
        pass  # a read-only home costs time at the next start, nothing else
    return digest.hexdigest()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "treeswarm" / "digests"
