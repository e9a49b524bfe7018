"""Give the headers of a model's weights, also where the weights are not on this machine.

The functions that load a model read names, dtypes and shapes from the files' headers.  A *stub* is a model directory
whose weight files have headers and nothing else, so those functions say of it what they would say of the weights.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from treeswarm.model_files import (
    INDEX,
    SINGLE,
    HubOptions,
    check_published,
    is_hub_id,
    needed_files,
    weight_files,
)
from treeswarm.model_sources.gguf_files import is_gguf_folder
from treeswarm_node.model.checkpoint.dequantize.recognition import TensorEntry
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.checkpoint.text_part import tensors_to_load

Headers = Mapping[str, Mapping[str, TensorEntry]]
"""Entry of each tensor by its name, by file."""
HERE = "the headers of the weights, which are here"
AT_HUB = "the headers of the weights at the hub; nothing else was downloaded"
FROM_CONFIG = "the config alone, because weights are not here"


@dataclass(frozen=True)
class HeadedModel:
    """Names a model directory that has headers."""

    folder: Path
    source: str
    """What the headers are from, in words."""
    is_published: bool
    """Whether the headers are those of the published files: those that are made from the config are not."""


@contextmanager
def with_headers(name: str, folder: Path, hub: HubOptions) -> Iterator[HeadedModel]:
    """Yield a directory with the config of `folder` and with headers: of its weights, of those at the hub, or computed.

    Raises ModelError, and UnsupportedModel if the config is of a model that cannot be built.
    """
    if not _weights_missing(folder):
        yield HeadedModel(folder, HERE, is_published=True)
        return
    with TemporaryDirectory(prefix="treeswarm-headers-") as directory:
        stub, source = Path(directory), FROM_CONFIG
        headers, why_not = _read_at_hub(name, hub) if is_hub_id(name) and not Path(name).is_dir() else (None, "")
        if headers is None:
            _write_stub(folder, stub, {SINGLE: _entries_of_modules(folder)})
            source += f" ({why_not})" if why_not else ""
        else:
            _write_stub(folder, stub, headers)
        yield HeadedModel(stub, AT_HUB if headers is not None else source, is_published=headers is not None)


def _weights_missing(folder: Path) -> bool:
    if is_gguf_folder(folder):
        return False
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        weight_files(folder)  # raises the error that a start would raise
    return not all((folder / file).exists() for file in needed_files(folder, None, tensors_to_load(folder)))


def _read_at_hub(name: str, hub: HubOptions) -> tuple[Headers | None, str]:
    """Return the headers of a model's files at the hub, or None and the reason why they cannot be read.

    Raises ModelError if the repository has none.
    """
    try:
        from huggingface_hub import HfApi  # noqa: PLC0415  # Only needed for hub ids.

        found = HfApi().get_safetensors_metadata(name, revision=hub.revision, token=hub.token)
    except Exception as error:  # The hub's client raises errors of requests, of httpx and its own.
        check_published(name, type(error).__name__ != "NotASafetensorsRepoError")
        reason = next(iter(str(error).splitlines()), "")[:160]
        return None, f"their headers cannot be read at the hub: {type(error).__name__} {reason}".rstrip()
    return {
        file: {tensor: TensorEntry(info.dtype, tuple(info.shape)) for tensor, info in header.tensors.items()}
        for file, header in found.files_metadata.items()
    }, ""


def _entries_of_modules(folder: Path) -> dict[str, TensorEntry]:
    """Return what a checkpoint in 16 bits of the model that config.json describes would have."""
    state = build_skeleton(folder, torch.bfloat16).state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}  # tied weights are stored once
    return {name: TensorEntry("BF16", tuple(state[name].shape)) for name in first.values()}


def _write_stub(folder: Path, stub: Path, headers: Headers) -> None:
    for file in folder.glob("*.json"):
        if file.name != INDEX:
            shutil.copy(file, stub)
    for name, entries in headers.items():
        _write_headers(stub / name, entries)
    if list(headers) != [SINGLE]:
        weight_map = {tensor: name for name, entries in headers.items() for tensor in entries}
        (stub / INDEX).write_text(json.dumps({"weight_map": weight_map}), "utf-8")


def _write_headers(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Write a file with headers, and with no data: all tensors are said to be at its start.

    Only biases beside GPTQ's codes are looked into when tensors are matched, so such a file has its size, as a hole
    that reads as zeros.  Old tools write biases of zeros.
    """
    is_sized = any(name.endswith(".qweight") for name in entries)
    header: dict[str, Any] = {}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + (entry.size if is_sized else 0)
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
