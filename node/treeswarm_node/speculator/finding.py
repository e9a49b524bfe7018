"""Find the speculator of a node: a folder, a published head on the hub, or what lies at hand.  No weights are read."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import treeswarm
from treeswarm.errors import BadRequest, ModelError
from treeswarm.model_files import HubOptions, is_hub_id, needed_files, read_shape, resolve_model
from treeswarm.protocol.spans import Span
from treeswarm_node.speculator.eagle3.config import EAGLE3
from treeswarm_node.speculator.eagle3.known_heads import KnownHead, known_heads
from treeswarm_node.speculator.eagle3.loading import read_head_config
from treeswarm_node.speculator.files import CONFIG, WEIGHTS, read_speculator_config
from treeswarm_node.speculator.mtp import MTP
from treeswarm_node.speculator.mtp_loading import can_read_mtp, mtp_bytes

log = logging.getLogger(__name__)

AUTO, NONE = "auto", "none"
BESIDE = "speculator"
"""Folder in a model's directory in which `auto` looks for a speculator."""
BUNDLED = Path(treeswarm.__file__).parent / "models" / "speculators"
"""Folder with the speculators that are part of the package, one folder each."""
TRAINED = "trained"
"""Kind of the folders that `swarm train-speculator` writes."""


@dataclass(frozen=True)
class FoundSpeculator:
    """A speculator that is on this machine, or whose weights can be fetched."""

    folder: Path
    kind: str
    """TRAINED, EAGLE3 or MTP."""
    hub_id: str = ""
    """Hub id whose weights may have to be fetched, or an empty string."""

    def memory_bytes(self, width: int, target_width: int) -> int:
        """Return the bytes that it takes beside the last block, with values of `width` bytes.

        An embedding has values of `target_width` bytes; one that the target has already is counted, too.
        """
        if self.kind == TRAINED:  # stored in 8 bits or more, held in 32 at most
            return 4 * (self.folder / WEIGHTS).stat().st_size
        if self.kind == MTP:
            shape = read_shape(self.folder)
            layer = mtp_bytes(self.folder, shape.blocks, target_width)
            return layer + shape.vocab_size * shape.hidden_size * target_width
        config = read_head_config(self.folder)
        return config.weights * width + config.vocab_size * config.hidden_size * target_width

    def tap_bytes(self, width: int) -> int:
        """Return the bytes that a node before the last block may need for its taps, with values of `width` bytes.

        Heads that are trained here may have taps on several nodes, others have them all on the node of the last block.
        Raises ModelError.
        """
        if self.kind != TRAINED:
            return 0
        config = read_speculator_config(self.folder)
        return len(config.taps) * config.hidden_size**2 * width


def find_speculator(
    choice: str, model_folder: Path, hub: HubOptions, model: str = "", *, logs: bool = False
) -> FoundSpeculator | None:
    """Find the speculator that `--speculator` names for `model`, whose directory is given; None if there is none.

    A head that is named by its hub id has its config fetched, and `mtp` the files of the model's own layer; `auto`
    fetches nothing, and logs what it took, or what there is to fetch.  Raises ModelError.
    """
    if choice == NONE:
        return None
    if choice == AUTO:
        beside = _kind_of(model_folder / BESIDE)
        if beside is not None:
            return FoundSpeculator(model_folder / BESIDE, beside)
        say = log.info if logs else log.debug
        return _find_mtp(model_folder) or _find_bundled(model_folder) or _find_known(model_folder, hub, say)
    if choice == MTP:
        after_last = read_shape(model_folder).blocks
        if is_hub_id(model) and not Path(model).is_dir():
            resolve_model(model, weights=True, span=Span(after_last, after_last + 1), hub=hub)
        return FoundSpeculator(model_folder, MTP)
    if kind := _kind_of(Path(choice)):
        return FoundSpeculator(Path(choice), kind)
    if Path(choice).is_dir() or not is_hub_id(choice):
        raise ModelError(
            f"there is no speculator in '{choice}': give a folder that `swarm train-speculator` wrote, an EAGLE-3 head "
            "(its folder or its hub id), mtp, auto or none"
        )
    return FoundSpeculator(resolve_model(choice, hub=hub.for_another_model()), EAGLE3, choice)


def _kind_of(folder: Path) -> str | None:
    if (folder / CONFIG).is_file():
        return TRAINED
    return EAGLE3 if (folder / "config.json").is_file() else None


def _find_mtp(model_folder: Path) -> FoundSpeculator | None:
    """Return the MTP layer of the model's own checkpoint, if its files are here and it can be read."""
    blocks = read_shape(model_folder).blocks
    try:
        is_here = mtp_bytes(model_folder, blocks, 1) > 0 and can_read_mtp(model_folder)
    except ModelError:  # the weights are not here
        return None
    return FoundSpeculator(model_folder, MTP) if is_here else None


def _find_bundled(model_folder: Path) -> FoundSpeculator | None:
    """Return the bundled speculator for models of this shape.

    The same model is published with several configs, as safetensors and as GGUF, so digests say too little; another
    model of the same shape is found out by the check.
    """
    shape = read_shape(model_folder)
    for folder in sorted(BUNDLED.iterdir()) if BUNDLED.is_dir() else ():
        config = read_speculator_config(folder)
        sizes = (config.hidden_size, config.vocab_size, config.taps[-1] + 1)
        if sizes == (shape.hidden_size, shape.vocab_size, shape.blocks):
            return FoundSpeculator(folder, TRAINED)
    return None


def _find_known(model_folder: Path, hub: HubOptions, say: Callable[..., None]) -> FoundSpeculator | None:
    """Return a published head for models of this shape if one is on this machine, and otherwise say which there is."""
    heads: Sequence[KnownHead] = known_heads(read_shape(model_folder))
    for head in heads:
        folder = _copy_here(head.hub_id, model_folder, hub)
        if folder is not None:
            say("the head %s is on this machine: it is taken (--speculator none: it is not)", head.hub_id)
            return FoundSpeculator(folder, EAGLE3)
    if heads:
        say(
            "for models of this shape %s is published: --speculator %s fetches it (%.1f GB), and texts come faster",
            heads[0].hub_id, heads[0].hub_id, heads[0].gigabytes,
        )  # fmt: skip
    return None


def _copy_here(hub_id: str, model_folder: Path, hub: HubOptions) -> Path | None:
    """Return the directory of a complete copy: beside the model's own, or in the hub's cache; or None."""
    beside = model_folder.absolute().parent / hub_id.rpartition("/")[2]
    if _is_complete(beside):
        return beside
    try:
        cached = resolve_model(hub_id, hub=replace(hub.for_another_model(), local_files_only=True))
    except (BadRequest, ModelError):  # it is not in the cache, or there is no huggingface_hub
        return None
    return cached if _is_complete(cached) else None


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and all((folder / file).is_file() for file in needed_files(folder, None))
