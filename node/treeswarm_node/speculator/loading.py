"""Load the speculator of a node: the one that its owner names, or the one that lies at hand."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from treeswarm.errors import ModelError
from treeswarm.model_files import DEFAULT_HUB, HubOptions, resolve_model
from treeswarm.progress import Progress
from treeswarm.protocol.spans import Span
from treeswarm_node.engine.tap_slice import TapSlice, head_digest
from treeswarm_node.model.checkpoint.embedding import read_embedding
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator
from treeswarm_node.speculator.eagle3.loading import HeadTarget, load_eagle3
from treeswarm_node.speculator.files import PARALLEL, SpeculatorConfig, read_speculator_config, read_speculator_weights
from treeswarm_node.speculator.finding import AUTO, NONE, TRAINED, FoundSpeculator, find_speculator
from treeswarm_node.speculator.head import EPSILON, FIRST_MATRIX
from treeswarm_node.speculator.load_check import check_at_load
from treeswarm_node.speculator.mtp import MTP
from treeswarm_node.speculator.mtp_loading import load_mtp
from treeswarm_node.speculator.parallel.speculator import ParallelSpeculator
from treeswarm_node.speculator.seam import ReadsTapSums, Speculator, can_tap
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
        found = find_speculator(choice, folder, hub, name, logs=True)
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
        config = _read_trained(found.folder, served)
        is_certain = config.config_digest == served.config
        # What is checked, or reads no sums of other nodes' taps, has all its taps on one node.
        if not is_certain or config.kind == PARALLEL:
            _check_taps(found.folder, config.taps, served)
        trained: ParallelSpeculator | AutoregressiveSpeculator
        if config.kind == PARALLEL:
            trained = ParallelSpeculator.load(found.folder, lm_head, is_tied=is_tied, dtype=dtype)
        else:
            hosted = hosted_taps(config.taps, served.span)
            trained = AutoregressiveSpeculator.load(found.folder, lm_head, is_tied=is_tied, dtype=dtype, hosted=hosted)
        trained.compute_in_eight_bits()
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
    speculator.compute_in_eight_bits()
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


def _read_trained(place: Path, served: ServedSpan) -> SpeculatorConfig:
    """Return the config of a speculator that was trained here, and say how it differs.  Raises ModelError.

    One model has several configs and digests, as safetensors, as GGUF and in other numbers of bits.
    """
    config = read_speculator_config(place)
    if config.config_digest != served.config:
        log.warning("the speculator in '%s' was trained on a model with another config: its guesses are checked", place)
        return config
    if config.taps[0] < served.span.start:
        log.info(
            "the speculator in '%s' reads the results of blocks %s: every node from block %d on must have it",
            place, _listed(config.taps), config.taps[0],
        )  # fmt: skip
    if config.weights_digest != served.numerics.weights:
        log.warning(
            "the speculator in '%s' was trained on other weights: it may guess worse, but the text is exact",
            place,
        )
    return config


def _check_taps(place: Path, taps: tuple[int, ...], served: ServedSpan) -> None:
    if not can_tap(taps, served.span.start, served.span.end):
        raise ModelError(
            f"the speculator in '{place}' reads the results of blocks {_listed(taps)}, and this node hosts "
            f"{served.span}: host from block {taps[0]} on (--blocks {taps[0]}:{served.blocks}), or give "
            "--speculator none"
        )


def _listed(taps: tuple[int, ...]) -> str:
    return ", ".join(map(str, taps))


def load_tap_slice(
    choice: str,
    model: SpanModel,
    folder: Path,
    served: ServedSpan,
    speculator: Speculator | None,
    name: str = "",
    hub: HubOptions = DEFAULT_HUB,
) -> TapSlice | None:
    """Load this node's part of a head's first matrix, by which it adds its taps to those of other nodes.

    `speculator` is the node's own, if it hosts the last block; its part is here already.  Return None where there is no
    head whose taps may lie on several nodes.  Raises ModelError if a speculator that was named does not fit.
    """
    if model.loaded.is_tail:
        part = speculator.tap_slice if isinstance(speculator, ReadsTapSums) else None
        return part if part is not None and part.head else None
    try:
        found = find_speculator(choice, folder, hub, name)
        if found is None or found.kind != TRAINED:
            return None
        config = read_speculator_config(found.folder)
        if config.config_digest != served.config:
            log.info(
                "the speculator in '%s' was trained on a model with another config: this node adds no taps",
                found.folder,
            )
            return None
        dtype = torch.float32 if model.device.type == "cpu" else model.dtype
        part = read_tap_slice(found.folder, config, hosted_taps(config.taps, served.span), model.device, dtype)
    except ModelError as error:
        if choice != AUTO:
            raise
        log.warning("this node adds no taps: %s", error)
        return None
    blocks = _listed(tuple(part.columns)) or "none, and it passes sums on"
    log.info("this node adds taps to what the speculator in '%s' reads at the tail: blocks %s", found.folder, blocks)
    return part


def read_tap_slice(
    place: Path, config: SpeculatorConfig, hosted: range, device: torch.device, dtype: torch.dtype
) -> TapSlice:
    """Read the columns of the taps at the places `hosted`.  Raises ModelError."""
    matrix, size = read_speculator_weights(place, FIRST_MATRIX).get(FIRST_MATRIX), config.hidden_size
    if matrix is None or tuple(matrix.shape) != (size, size * len(config.taps)):
        raise ModelError(f"the weights in '{place}' are not those of its config: train it again")
    columns = {config.taps[i]: matrix[:, i * size : (i + 1) * size].to(device, dtype, copy=True) for i in hosted}
    digest = head_digest(matrix, config.taps, EPSILON)
    return TapSlice(digest, config.taps, columns, size, config.window, EPSILON)


def hosted_taps(taps: tuple[int, ...], span: Span) -> range:
    """Return the places of the taps that lie in a span."""
    return range(sum(tap < span.start for tap in taps), sum(tap < span.end for tap in taps))
