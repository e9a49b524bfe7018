"""Finds a model's files and reads its config and tokenizer, without reading weights and without torch."""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.model_sources import gguf_files
from treeswarm.model_sources.generation_config import FILE as GENERATION_CONFIG
from treeswarm.model_sources.generation_config import GenerationDefaults, parse_generation_config
from treeswarm.model_sources.gguf_files import gguf_folder, is_converted, is_gguf, is_gguf_folder
from treeswarm.model_sources.hub_errors import explain_hub_error
from treeswarm.model_sources.hub_gguf import fetch_tensors, hub_gguf_folder, is_hub_gguf
from treeswarm.model_sources.named_models import NAMED, fetch_named, is_fetched
from treeswarm.model_sources.text_configs import text_settings
from treeswarm.model_sources.tokenizer_files import TOKENIZER, tokenizer_folder
from treeswarm.progress import Progress, progress_bar_class
from treeswarm.protocol.spans import Span

BUNDLED = ("demo", "demo-draft")
CLIENT_FILES = ("*.json", "*.txt", "tokenizer*", "*.jinja", "*.model", "*.tiktoken")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Matches the number of a decoder block in the name of a checkpoint's tensor; GGUF files call blocks `blk`.
BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|blk)\.(\d+)\.")
# Names that configs have for a model's sizes, as transformers' classes map them.  LongCat-Flash counts attentions as
# hidden layers, and has two of them in each of its `num_layers` blocks.
SIZE_NAMES = {
    "blocks": ("num_layers", "num_hidden_layers", "n_layer", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "max_positions": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    "vocab_size": ("vocab_size",),
}
# Name of the list of every block's kind, which is all that transformers' configs of Nemotron-H say of their number.
BLOCK_KINDS = "layers_block_type"
# Field of a config whose model has no chain of blocks with one row per token, and what it does instead.
OTHER_SHAPES = {"patcher_config": "they group bytes into patches, whose ends another model chooses"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubOptions:
    """Options with which `huggingface_hub` looks for a model.

    Options that are left out follow its environment variables (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN,
    HF_ENDPOINT).
    """

    revision: str | None = None
    """Branch, tag or commit, or None for the default branch."""
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    """Access token; True for the one that `hf auth login` stored, False for none."""
    local_files_only: bool = False

    def for_another_model(self) -> "HubOptions":
        """Return the same options without the revision, which is one of this model's repository."""
        return replace(self, revision=None)

    def as_arguments(self) -> dict[str, Any]:
        """Return the options that were given, as keyword arguments of `snapshot_download`."""
        options = {"revision": self.revision, "cache_dir": self.cache_dir, "token": self.token}
        given = {name: value for name, value in options.items() if value is not None}
        return given | {"local_files_only": True} if self.local_files_only else given


DEFAULT_HUB = HubOptions()


@dataclass(frozen=True)
class ModelShape:
    """Sizes and end-of-sequence ids of a model, as both programs need them, from its config alone."""

    model_type: str
    blocks: int
    """Number of decoder blocks."""
    hidden_size: int
    """Number of values in one row of activations between blocks."""
    vocab_size: int
    max_positions: int
    eos_ids: frozenset[int]


def resolve_model(
    name: str,
    *,
    weights: bool = False,
    span: Span | None = None,
    is_loaded: Callable[[str], bool] | None = None,
    block_of: Callable[[str], int | None] | None = None,
    hub: HubOptions = DEFAULT_HUB,
    progress: Progress | None = None,
) -> Path:
    """Return the directory of a model named by a directory, a GGUF file (here or on the hub), a short name or hub id.

    A directory is used as it is, offline.  A GGUF file has its directory in the cache.  A model with a short name is
    fetched once, and is a GGUF file then.  From the hub, config and tokenizer are downloaded.  With `weights`, so are
    the files that contain tensors of the blocks in `span` (None: all blocks) or of no block, as far as `is_loaded` says
    of a tensor's name that nodes load it (None: all tensors) and `block_of` to which block it belongs (None: as such
    names usually say).  Raises ModelError.
    """
    check_model_name(name)
    if name and Path(name).is_dir():
        return Path(name)
    if name in BUNDLED:
        return Path(str(files("treeswarm") / "models" / name))
    if name in NAMED:
        return gguf_folder(fetch_named(name, progress), progress)
    if is_hub_gguf(name):
        offline = hub.local_files_only
        folder = hub_gguf_folder(name, revision=hub.revision, token=hub.token, offline=offline, progress=progress)
        if weights:
            fetch_tensors(folder, span, token=hub.token, progress=progress)
        return folder
    if is_gguf(name):
        return gguf_folder(Path(name), progress)
    folder = _from_hub(name, CLIENT_FILES, hub)
    if weights:
        needed = needed_files(folder, span, is_loaded, block_of)
        _from_hub(name, needed, hub, progress)
        check_published(name, all((folder / file).exists() for file in needed))
    return folder


def is_path(name: str) -> bool:
    """Return whether a model's name can mean a directory of this machine alone, existing or not."""
    if is_hub_gguf(name):
        return False
    return Path(name).is_dir() or is_gguf(name) or (("/" in name or "\\" in name) and not is_hub_id(name))


def is_cached(name: str) -> bool:
    """Return whether files of the model are kept in this project's own cache: those of a GGUF file are."""
    return not Path(name).is_dir() and (name in NAMED or is_gguf(name))


def is_at_hand(name: str) -> bool:
    """Return whether a model's config can be read at once: it need not be fetched, nor made from a GGUF file."""
    if name in NAMED:
        return is_fetched(name) and is_converted(NAMED[name].file)
    if is_hub_gguf(name):
        return False
    if is_gguf(name) and not Path(name).is_dir():
        return is_converted(Path(name))
    return name in BUNDLED or is_path(name)


def check_model_name(name: str) -> None:
    """Raise ModelError if a name means no directory, bundled model or hub id.  The hub is not asked."""
    if (name and Path(name).is_dir()) or name in (*BUNDLED, *NAMED) or is_hub_gguf(name):
        return
    if is_gguf(name):
        if not Path(name).is_file():
            raise ModelError(f"there is no GGUF file '{name}': check the path")
        return
    if is_hub_id(name):
        return
    raise ModelError(
        f"there is no model '{name}': {_near_miss(name)}give a directory with config.json, a GGUF file, a hub id such "
        f"as org/model, or {' or '.join((*NAMED, *BUNDLED))}"
    )


def is_hub_id(name: str) -> bool:
    """Return whether a model's name has the form of a hub id.  A directory may have the same name."""
    return HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def _near_miss(name: str) -> str:
    """Suggest a bundled model or a neighbouring directory with a similar name, or return an empty string."""
    beside = [str(config.parent) for config in Path(name).parent.glob("*/config.json")]
    near = difflib.get_close_matches(name.removeprefix("./"), [*NAMED, *BUNDLED, *beside], n=1)
    return f"did you mean '{near[0]}'? Otherwise " if near else ""


def _from_hub(name: str, patterns: Sequence[str], hub: HubOptions, progress: Progress | None = None) -> Path:
    try:
        from huggingface_hub import constants, snapshot_download  # noqa: PLC0415  # Only needed for hub ids.
    except ImportError:
        raise ModelError(f"'{name}' is a hub id, which needs huggingface_hub: pip install huggingface_hub") from None
    bar = {"tqdm_class": progress_bar_class(progress)} if progress is not None else {}
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **hub.as_arguments(), **bar))
    except Exception as error:  # The hub's client raises errors of requests, of httpx and its own.
        described = f"'{name}'" if hub.revision is None else f"revision '{hub.revision}' of '{name}'"
        if hub.local_files_only or constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{described} is not in the cache ({hub.cache_dir or constants.HF_HUB_CACHE}), and asking the hub is "
                "switched off (local_files_only or HF_HUB_OFFLINE): download it once while online, or give a directory"
            ) from error
        raise ModelError(explain_hub_error(error, name, revision=hub.revision)) from error


def check_published(name: str, has_safetensors: bool) -> None:
    """Raise ModelError if a repository of the hub has no weights that are ever read."""
    if not has_safetensors:
        raise ModelError(
            f"'{name}' has no complete weights as safetensors on the hub, and .bin files are never loaded: choose a "
            "repository with safetensors, or a GGUF file as org/model:file.gguf"
        )


def needed_files(
    folder: Path,
    span: Span | None,
    is_loaded: Callable[[str], bool] | None = None,
    block_of: Callable[[str], int | None] | None = None,
) -> list[str]:
    """Return the names of the weight files that a node of `span` (None: all blocks) reads, sorted.

    They follow from the index; a model without an index has a single file.  `is_loaded` says of a tensor's name whether
    nodes load it (None: all tensors): of a multimodal wrapper they load the text decoder alone.  `block_of` says to
    which block a tensor belongs (None: by its name's usual form).
    """
    if not (folder / INDEX).exists():
        return [SINGLE]
    needed = set()
    for file, tensors in weight_files(folder).items():
        for tensor in filter(is_loaded or _is_any, tensors):
            block = (block_of or usual_block_of)(tensor)
            if span is None or block is None or span.start <= block < span.end:
                needed.add(file)
    return sorted(needed)


def _is_any(_: str) -> bool:
    return True


def usual_block_of(tensor: str) -> int | None:
    """Return the decoder block to which a tensor belongs by the usual form of its name, or None.

    Parts that read images have such names too: what knows the model's modules tells their layers apart.
    """
    match = BLOCK.search(tensor)
    return int(match[1]) if match else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of `config.json`.  Raises ModelError."""
    config = read_json(folder / "config.json", f"'{folder}' is no model directory")
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{folder / 'config.json'} names no model_type: it is not a transformers config")
    return config


def read_shape(folder: Path) -> ModelShape:
    """Read the model's shape from its config.  Raises ModelError that names a missing field, and UnsupportedModel."""
    config = read_config(folder)
    for name, reason in OTHER_SHAPES.items():
        if name in config:
            raise UnsupportedModel(
                f"models of type '{config['model_type']}' are not supported: {reason}, which is not supported yet"
            )
    text = text_settings(config)
    sizes = {
        size: next((text[name] for name in names if text.get(name) is not None), None)
        for size, names in SIZE_NAMES.items()
    }
    if sizes["blocks"] is None and isinstance(text.get(BLOCK_KINDS), list):
        sizes["blocks"] = len(text[BLOCK_KINDS])
    sizes["max_positions"] = sizes["max_positions"] or 2**20
    try:
        for size, value in sizes.items():
            if value is None:
                raise ValueError(f"no {' or '.join(SIZE_NAMES[size])}")
        numbers = {size: int(str(value)) for size, value in sizes.items()}
        # Layers of Gemma 3n pass on several rows of activations per token (AltUp).
        numbers["hidden_size"] *= int(text.get("altup_num_inputs") or 1)
        return ModelShape(
            model_type=str(config["model_type"]),
            eos_ids=frozenset(_eos_ids(folder, text)),
            **numbers,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'config.json'} has a missing or malformed field ({error}): it is not a decoder model's config"
        ) from None


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Return the sampling defaults that the model's publisher recommends.  Raises ModelError."""
    path = folder / GENERATION_CONFIG
    return parse_generation_config(read_json(path, ""), path) if path.exists() else GenerationDefaults()


def _eos_ids(folder: Path, config: dict[str, Any]) -> Iterable[int]:
    path = folder / GENERATION_CONFIG
    generation = read_json(path, "") if path.exists() else {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return [] if eos is None else [int(e) for e in eos] if isinstance(eos, list) else [int(eos)]


def weight_files(folder: Path) -> dict[str, list[str]]:
    """Return the tensor names in each safetensors file of the checkpoint, by file name.

    Raises ModelError where files are missing, truncated or in another format.
    """
    if is_gguf_folder(folder):
        return {gguf_files.WEIGHTS: list(gguf_files.read_table(folder))}
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, "")
        by_file: dict[str, list[str]] = {}
        for tensor, file in index.get("weight_map", {}).items():
            by_file.setdefault(str(file), []).append(str(tensor))
        return by_file
    if (folder / SINGLE).exists():
        return {SINGLE: [name for name in read_header(folder / SINGLE) if name != "__metadata__"]}
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"'{folder}' has its weights as .bin files, which are never loaded: convert them to safetensors"
        )
    raise ModelError(f"'{folder}' has no {SINGLE} and no {INDEX}: the download is not complete, download it again")


def read_header(path: Path) -> dict[str, Any]:
    """Return a safetensors file's header: dtype, shape and offsets by tensor name.  Raises ModelError."""
    if not path.exists():
        raise ModelError(f"{path} is missing: the model directory is partial, download it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > size - 8:
                raise ValueError("the header runs past the file's end")
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            if 8 + length + max(ends, default=0) != size:
                raise ValueError(f"the file has {size} bytes, its header says {8 + length + max(ends, default=0)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is corrupt ({error}): download it again") from None
    return dict(header)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the model's own tokenizer.  Raises ModelError."""
    path = tokenizer_folder(folder) / TOKENIZER
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # The Rust library raises bare Exception.
        raise ModelError(f"{path} is no tokenizer ({error}): download it again") from None


def tokenizer_digest(folder: Path) -> str:
    """Return the hex SHA-256 of the tokenizer's vocabulary, merges and added tokens.  Raises ModelError."""
    content = read_json(tokenizer_folder(folder) / TOKENIZER, "")
    relevant = {key: content.get(key) for key in ("model", "added_tokens")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, problem: str) -> Any:
    """Return the content of a JSON file.  If it is missing, raise ModelError whose text begins with `problem`.

    Also raises ModelError if the file cannot be read or is malformed.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{problem}: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}): download it again") from None
