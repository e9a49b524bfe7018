"""Digests that identify a model: every machine computes the same from the same files."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treeswarm.errors import ModelError
from treeswarm.model_files import weight_files
from treeswarm.model_sources.cache import cache_folder
from treeswarm.model_sources.gguf_files import WEIGHTS
from treeswarm.model_sources.hub_gguf import file_digest, is_hub_folder
from treeswarm.progress import CHECKING, Progress

# Fields of config.json that do not change the model's output: names, versions, bookkeeping and how to run the model.
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
    """Return the hex SHA-256 of those fields of the config that change the model's output."""
    relevant = {key: value for key, value in config.items() if key not in NOT_NUMERIC and value is not None}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def weights_digest(
    folder: Path,
    config: dict[str, Any],
    progress: Progress | None = None,
    is_loaded: Callable[[str], bool] | None = None,
) -> str:
    """Return the hex SHA-256 of the config and the content of every weight file.

    Files without a tensor of which `is_loaded` says that nodes load it are left out (None: no file is).

    It covers every byte, so that replicas with the same digest agree to the last bit.  A file's SHA-256 is cached in
    the user's cache directory until its size or modification time changes.  For files of a hub snapshot that were not
    downloaded, the hub is asked for the SHA-256.  `progress` is called after each file.  Raises ModelError.
    """
    names = sorted(
        name for name, tensors in weight_files(folder).items() if is_loaded is None or any(map(is_loaded, tensors))
    )
    if is_hub_folder(folder):  # the copy has only the tensors that were needed
        hub_digests = {WEIGHTS: file_digest(folder)}
    else:
        hub_digests = _hub_digests(folder) if not all((folder / name).exists() for name in names) else {}
    sizes = {name: _size(folder / name) for name in names if name not in hub_digests}
    total, done = sum(sizes.values()), 0
    digest = hashlib.sha256(config_digest(config).encode())
    for name in names:
        digest.update(f"\n{name} {hub_digests.get(name) or _file_digest(folder / name)}".encode())
        done += sizes.get(name, 0)
        if progress is not None:
            progress(done, total, CHECKING)
    return digest.hexdigest()


def _hub_digests(folder: Path) -> dict[str, str]:
    """Return the hub's SHA-256 by file name if `folder` is a snapshot in the hub's cache, else an empty dict."""
    repository, snapshots, revision = folder.parts[-3:]
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return {}
    from huggingface_hub import HfApi  # noqa: PLC0415  # Only needed for hub snapshots.

    name = repository.removeprefix("models--").replace("--", "/")
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # The hub's client raises errors of requests, of httpx and its own.
        raise ModelError(
            f"cannot ask the hub for the weights of '{name}' ({type(error).__name__}), and only some are on disk: "
            "go online once, or give a local directory with all files"
        ) from error
    return {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}


def _size(path: Path) -> int:
    if not path.exists():
        raise ModelError(f"{path} is missing: the model directory is partial, download it again")
    return path.stat().st_size


def _file_digest(path: Path) -> str:
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
    cache_file = cache_folder("digests") / key
    if cache_file.exists():
        return cache_file.read_text("ascii")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        cache_file.write_text(digest.hexdigest(), "ascii")
    except OSError:
        pass  # With a read-only home directory, the next start takes longer.
    return digest.hexdigest()
