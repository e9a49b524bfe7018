"""Drafters: they guess which tokens the target will generate."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from treeswarm.errors import BadRequest, Mismatch, ModelError
from treeswarm.extras import install_command
from treeswarm.model_files import DEFAULT_HUB, HubOptions, read_shape, resolve_model
from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.drafters.selection.automatic import (
    TAIL,
    TAIL_NGRAM,
    WITH_NGRAM,
    DraftChoice,
    TailOffer,
    choose_model,
    choose_ngrams,
    choose_tail,
)
from treeswarm_client.drafters.selection.find_draft import MissingDraft, find_draft
from treeswarm_client.drafters.selection.vocabulary import share_vocabulary
from treeswarm_client.drafters.suffix import SuffixDrafter
from treeswarm_client.drafters.tail.tail_drafter import TailDrafter
from treeswarm_client.drafters.token_recycling import TokenRecyclingDrafter
from treeswarm_client.drafters.union import UnionDrafter, UnionMember

if TYPE_CHECKING:
    from treeswarm_client.drafters.model import ModelDrafter

log = logging.getLogger(__name__)


def load_drafter(
    name: str, target: Path, device: str = "cpu", dtype: str = "float32", hub: HubOptions = DEFAULT_HUB
) -> Drafter:
    """Load the drafter `name` for a target (a model directory).

    `none` drafts nothing.  `tail` takes what the chain's tail proposes, if that has a speculator.  `ngram` needs no
    model: it drafts what this client's texts and the target's own tokens repeat.  A directory, hub id or bundled name
    is a draft model; with `+ngram` behind it, both draft into one tree.
    `auto` is `tail+ngram` where a tail has a speculator (see `choose_drafter`), else `ngram` with a draft model that
    has the target's vocabulary: a bundled one, or its family's if that is on this machine; `ngram` alone if there is
    none or no torch.  It never downloads anything.

    Raises BadRequest for any other name, ModelError for a bad directory, Mismatch if draft and target have different
    tokenizers.
    """
    return choose_drafter(name, target, str(target), device, dtype, hub)[0]


def choose_drafter(
    name: str,
    target: Path,
    model: str,
    device: str = "cpu",
    dtype: str = "float32",
    hub: HubOptions = DEFAULT_HUB,
    offer: TailOffer | None = None,
) -> tuple[Drafter, DraftChoice]:
    """Load a drafter as `load_drafter` does, and say which it is and why.

    `model` is the target as users name it, `offer` what the tail of a chain has to propose with, if it has anything.
    """
    named = DraftChoice(name, "as named")
    if name == "none":
        return NoneDrafter(), named
    if name == "ngram":
        return UnionDrafter(_ngram(), name), named
    if name in (TAIL, TAIL_NGRAM):
        return TailDrafter() if name == TAIL else UnionDrafter([*_ngram(), TailDrafter()], name), named
    if name == "auto":
        drafter, choice = _auto(target, model, device, dtype, hub, offer)
        log.log(logging.WARNING if choice.fallback else logging.INFO, "%s", choice)
        return drafter, choice
    if name.endswith(WITH_NGRAM):
        loaded = _model(name.removesuffix(WITH_NGRAM), target, device, dtype, hub)
        return UnionDrafter([*_ngram(), loaded], name), named
    return _model(name, target, device, dtype, hub), named


def _ngram() -> list[UnionMember]:
    return [SuffixDrafter(), TokenRecyclingDrafter()]


def choose_without_model(why: str, offer: TailOffer | None) -> tuple[Drafter, DraftChoice]:
    """Return a drafter that needs no model, and say which it is; `why` says as a clause why no model is used.

    It is the same drafter whether the tail has a speculator or not: a tail that proposes nothing costs it nothing, and
    another tail may take its place.
    """
    drafter = UnionDrafter([*_ngram(), TailDrafter()], "auto")
    return drafter, choose_ngrams(why) if offer is None else choose_tail(offer)


def _auto(
    target: Path, model: str, device: str, dtype: str, hub: HubOptions, offer: TailOffer | None
) -> tuple[Drafter, DraftChoice]:
    """Choose a drafter for the target."""
    if offer is not None and not offer.is_weak:
        return choose_without_model("the tail proposes", offer)
    found = find_draft(target, model, hub)
    if isinstance(found, MissingDraft):
        return choose_without_model(found.why, offer)
    try:
        loaded = _load_model(found.folder, target, device, dtype)
    except (BadRequest, ModelError) as error:
        return choose_without_model(str(error), offer)
    return UnionDrafter([*_ngram(), loaded], "auto"), choose_model(found.name, model, offer)


def _model(name: str, target: Path, device: str, dtype: str, hub: HubOptions = DEFAULT_HUB) -> UnionMember:
    folder = resolve_model(name, hub=hub)
    if not share_vocabulary(folder, target):
        raise Mismatch(
            f"the tokenizer of draft model '{name}' differs from the target's, so its guesses would be other tokens: "
            "name a draft model of the same family, or ngram"
        )
    _model_drafter()  # what computes it is missed before it is downloaded
    return _load_model(resolve_model(name, weights=True, hub=hub), target, device, dtype)


def _load_model(folder: Path, target: Path, device: str, dtype: str) -> UnionMember:
    vocab_size = read_shape(target).vocab_size
    return _model_drafter().load(folder, device=device, dtype=dtype, vocab_size=vocab_size)


def _model_drafter() -> "type[ModelDrafter]":
    """Import the drafter that brings torch.  Raises BadRequest without torch."""
    try:
        from treeswarm_client.drafters.model import ModelDrafter  # noqa: PLC0415
    except ImportError as error:
        raise BadRequest(
            f"a draft model needs torch, but {error.name} is missing: {install_command('draft')}, or --draft ngram"
        ) from error
    return ModelDrafter
