"""GGUF files as model directories: small files are made in the cache, and the weights stay where they are."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from treeswarm.errors import ModelError
from treeswarm.extras import require
from treeswarm.model_sources.cache import cache_folder, fill_once
from treeswarm.model_sources.conversion import convert
from treeswarm.progress import CONVERTING, Progress

SUFFIX = ".gguf"
WEIGHTS = "model.gguf"
"""Link in a model directory to the GGUF file that has the weights."""
TABLE = "gguf-tensors.json"
"""File of a model directory with the shape of every tensor of the GGUF file."""
# Raised whenever the conversion writes something else, so that older caches are left alone.
VERSION = 3
# Matches the number of a decoder block in the name of a GGUF file's tensor.
BLOCK = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class GGUFEntry:
    """The shape and place of one tensor of a GGUF file."""

    shape: tuple[int, ...]
    """Numbers of values, in torch's order."""
    kind: str
    """Name of the type in which it is stored, such as Q4_K."""
    offset: int
    """Number of bytes before it in the file."""
    size: int
    """Number of its bytes in the file."""


def is_gguf(name: str) -> bool:
    """Return whether a model's name is that of a GGUF file."""
    return name.lower().endswith(SUFFIX)


def gguf_folder(file: Path, progress: Progress | None = None) -> Path:
    """Return the model directory of a GGUF file; it is made when the file is used for the first time.

    Raises ModelError if the file cannot be used, BadRequest if packages are missing.
    """
    folder = _folder_of(file)
    if not folder.is_dir():
        require("gguf", f"the GGUF file '{file.name}'")
        if progress is not None:
            progress(0, 0, CONVERTING)
    return fill_once(folder, lambda target: _fill(file, target))


def is_converted(file: Path) -> bool:
    """Return whether the model directory of a GGUF file has been made."""
    return file.is_file() and _folder_of(file).is_dir()


def _folder_of(file: Path) -> Path:
    try:
        status = file.stat()
    except OSError:
        raise ModelError(f"there is no GGUF file '{file}': check the path") from None
    identity = f"{VERSION}\n{file.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    return cache_folder("gguf", f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}")


def _fill(file: Path, target: Path) -> None:
    convert("gguf", file, target)
    (target / WEIGHTS).symlink_to(file.resolve())


def is_gguf_folder(folder: Path) -> bool:
    """Return whether the weights of a model directory are in a GGUF file."""
    return (folder / TABLE).exists()


def read_table(folder: Path) -> Mapping[str, GGUFEntry]:
    """Return the shape of every tensor of the GGUF file by its name there.  Raises ModelError."""
    try:
        table = json.loads((folder / TABLE).read_text("utf-8"))["tensors"]
        return {name: GGUFEntry(tuple(shape), *stored) for name, (shape, *stored) in table.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder / TABLE} cannot be read ({error}): delete {folder} and try again") from None


def read_architecture(folder: Path) -> str:
    """Return the name that the GGUF file gives its architecture, such as `llama`."""
    return str(json.loads((folder / TABLE).read_text("utf-8"))["architecture"])
