"""Load the speculator of a node: the one that its owner names, or the one that lies beside the model."""

import logging
from pathlib import Path

import torch

from treeswarm.errors import ModelError
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator
from treeswarm_node.speculator.files import CONFIG, WEIGHTS, read_speculator_config
from treeswarm_node.speculator.seam import Speculator, can_tap

log = logging.getLogger(__name__)

BESIDE = "speculator"
"""Folder in a model's directory in which `auto` looks for a speculator."""


def load_speculator(choice: str, model: SpanModel, folder: Path, served: ServedSpan) -> Speculator | None:
    """Load the speculator for a span: `none`, `auto`, or its folder.  `folder` is the model's directory.

    Return None for a span that does not end with the last block, and where `auto` finds none that fits.  Raises
    ModelError if a speculator that was named does not fit.
    """
    if choice == "none" or not model.loaded.is_tail:
        return None
    automatic = choice == "auto"
    place = folder / BESIDE if automatic else Path(choice)
    if automatic and not (place / CONFIG).exists():
        return None
    try:
        return _load(place, model, served)
    except ModelError as error:
        if not automatic:
            raise
        log.warning("this node speculates nothing: %s", error)
        return None


def _load(place: Path, model: SpanModel, served: ServedSpan) -> Speculator:
    config, span = read_speculator_config(place), served.span
    if config.config_digest != served.config:
        raise ModelError(f"the speculator in '{place}' is for another model: its config's digest differs")
    if not can_tap(config.taps, span.start, span.end):
        raise ModelError(
            f"the speculator in '{place}' reads the results of blocks {', '.join(map(str, config.taps))}, and this "
            f"node hosts {span}: host from block {config.taps[0]} on, or give --speculator none"
        )
    if config.weights_digest != served.numerics.weights:
        log.warning(
            "the speculator in '%s' was trained on other weights: it may guess worse, but the text is exact",
            place,
        )
    lm_head, is_tied = model.lm_head()
    dtype = torch.float32 if model.device.type == "cpu" else model.dtype
    speculator = AutoregressiveSpeculator.load(place, lm_head, is_tied=is_tied, dtype=dtype)
    log.info("the speculator in '%s' proposes trees at this tail", place)
    return speculator


def speculator_bytes(choice: str) -> int:
    """Return the memory to set aside for a speculator that is named: what its weights take in float32."""
    if choice in ("auto", "none"):
        return 0
    try:
        return 4 * (Path(choice) / WEIGHTS).stat().st_size
    except OSError:
        return 0
