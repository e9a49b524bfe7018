"""Load the speculator of a node: the one that its owner names, or the one that lies at hand."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from treeswarm.errors import ModelError
from treeswarm.model_files import DEFAULT_HUB, HubOptions, resolve_model
from treeswarm.progress import Progress
from treeswarm_node.model.checkpoint.embedding import read_embedding
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator
from treeswarm_node.speculator.eagle3.loading import HeadTarget, load_eagle3
from treeswarm_node.speculator.files import read_speculator_config
from treeswarm_node.speculator.finding import AUTO, NONE, TRAINED, FoundSpeculator, find_speculator
from treeswarm_node.speculator.load_check import check_at_load
from treeswarm_node.speculator.mtp import MTP
from treeswarm_node.speculator.mtp_loading import load_mtp
from treeswarm_node.speculator.seam import Speculator, can_tap
from treeswarm_node.speculator.self_check import CheckedSpeculator

log = logging.getLogger(__name__)


def load_speculator(
    choice: str,
    model: SpanModel,
    folder: Path,
    served: ServedSpan,
    name: str = "",
    hub: HubOptions = DEFAULT_HUB,
    progress: Progress | None = None,
) -> Speculator | None:
    """Load the speculator for a span: `none`, `auto`, a folder or a hub id.

    `folder` is the directory of the model called `name`.  Return None for a span that does not end with the last block,
    and where `auto` finds none that fits.  Raises ModelError if a speculator that was named does not fit.
    """
    if choice == NONE or not model.loaded.is_tail:
        return None
    try:
        found = find_speculator(choice, folder, hub, name)
        if found is None:
            return None
        speculator = _load(found, model, folder, served, name, hub, progress)
    except ModelError as error:
        if choice != AUTO:
            raise
        log.warning("this node speculates nothing: %s", error)
        return None
    log.info("the speculator in '%s' proposes trees at this tail", found.folder)
    return speculator


def _load(
    found: FoundSpeculator,
    model: SpanModel,
    folder: Path,
    served: ServedSpan,
    name: str,
    hub: HubOptions,
    progress: Progress | None,
) -> Speculator:
    lm_head, is_tied = model.lm_head()
    dtype = torch.float32 if model.device.type == "cpu" else model.dtype
    if found.kind == TRAINED:
        is_certain = _check_trained(found.folder, served)
        trained = AutoregressiveSpeculator.load(found.folder, lm_head, is_tied=is_tied, dtype=dtype)
        return trained if is_certain else _checked(trained, str(found.folder), model, folder, served)
    if found.kind == MTP:
        layer = load_mtp(folder, model, served, partial(_embedding, model, folder))
        return _checked(layer, f"{folder} (its MTP layer)", model, folder, served)
    if found.hub_id:
        resolve_model(found.hub_id, weights=True, hub=hub.for_another_model(), progress=progress)
    skeleton: Any = model.loaded.skeleton
    target = HeadTarget(
        name=name,
        architectures=tuple(skeleton.config.architectures or ()),
        blocks=served.blocks,
        hidden_size=served.hidden_size,
        lm_head=lm_head,
        read_embedding=partial(_embedding, model, folder),
        dtype=model.dtype,
        config_digest=served.config,
        weights_digest=served.numerics.weights,
    )
    speculator = load_eagle3(found.folder, target, dtype)
    _check_taps(found.folder, speculator.taps, served)
    log.info("the head in '%s' reads the results of blocks %s", found.folder, _listed(speculator.taps))
    return _checked(speculator, found.hub_id or str(found.folder), model, folder, served)


def _checked(
    speculator: Speculator, source: str, model: SpanModel, folder: Path, served: ServedSpan
) -> CheckedSpeculator:
    """Return a speculator under its check, which a node of the whole model begins now.  Raises ModelError."""
    checked = CheckedSpeculator(speculator, source)
    if len(served.span) == served.blocks:
        check_at_load(model, checked, folder)
    return checked


def _embedding(model: SpanModel, folder: Path) -> torch.Tensor:
    """Return the target's embedding [vocabulary, hidden], from memory where it is."""
    lm_head, is_tied = model.lm_head()
    skeleton: Any = model.loaded.skeleton
    weight: torch.Tensor = lm_head if is_tied else skeleton.get_input_embeddings().weight
    return weight if weight.device.type != "meta" else read_embedding(folder, skeleton, model.dtype)


def _check_trained(place: Path, served: ServedSpan) -> bool:
    """Return whether a speculator that was trained here is for this very model.  Raises ModelError if it cannot serve.

    One model has several configs and digests, as safetensors, as GGUF and in other numbers of bits.
    """
    config = read_speculator_config(place)
    _check_taps(place, config.taps, served)
    if config.config_digest != served.config:
        log.warning("the speculator in '%s' was trained on a model with another config: its guesses are checked", place)
        return False
    if config.weights_digest != served.numerics.weights:
        log.warning(
            "the speculator in '%s' was trained on other weights: it may guess worse, but the text is exact",
            place,
        )
    return True


def _check_taps(place: Path, taps: tuple[int, ...], served: ServedSpan) -> None:
    if not can_tap(taps, served.span.start, served.span.end):
        raise ModelError(
            f"the speculator in '{place}' reads the results of blocks {_listed(taps)}, and this node hosts "
            f"{served.span}: host from block {taps[0]} on (--blocks {taps[0]}:{served.blocks}), or give "
            "--speculator none"
        )


def _listed(taps: tuple[int, ...]) -> str:
    return ", ".join(map(str, taps))
