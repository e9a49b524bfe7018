"""Drafters: they guess which tokens the target will generate."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from treeswarm.errors import BadRequest, Mismatch, ModelError
from treeswarm.extras import install_command
from treeswarm.model_files import DEFAULT_HUB, HubOptions, read_shape, resolve_model
from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.drafters.selection.find_draft import MissingDraft, find_draft
from treeswarm_client.drafters.selection.vocabulary import share_vocabulary
from treeswarm_client.drafters.suffix import SuffixDrafter
from treeswarm_client.drafters.tail.tail_drafter import TailDrafter
from treeswarm_client.drafters.token_recycling import TokenRecyclingDrafter
from treeswarm_client.drafters.union import UnionDrafter, UnionMember

if TYPE_CHECKING:
    from treeswarm_client.drafters.model import ModelDrafter

log = logging.getLogger(__name__)

WITH_NGRAM = "+ngram"
TAIL = "tail"
"""Names the trees that the chain's tail proposes."""
MODELLESS = ("none", "ngram", "auto", TAIL, TAIL + WITH_NGRAM)
"""Drafts that need no model."""


@dataclass(frozen=True)
class DraftChoice:
    """Which drafter a client uses, and why."""

    name: str
    """What `--draft` would name it."""
    why: str
    """Reason, as the end of a sentence."""
    automatic: bool = False
    """Whether the client chose it, not the user."""
    fallback: bool = False
    """Whether a draft model would be better, but there is none that fits or can be loaded."""

    def __str__(self) -> str:
        model, plus, _ = self.name.partition(WITH_NGRAM)
        ngrams = "n-grams from the text"
        model = "the tail's proposals" if model == TAIL else model
        words = f"{model} and {ngrams}" if plus else ngrams if model == "ngram" else model
        return f"draft: {words}, {self.why}"

    def as_dict(self) -> dict[str, str]:
        """Return what programs are told."""
        return {"name": self.name, "why": self.why}


def load_drafter(
    name: str, target: Path, device: str = "cpu", dtype: str = "float32", hub: HubOptions = DEFAULT_HUB
) -> Drafter:
    """Load the drafter `name` for a target (a model directory).

    `none` drafts nothing.  `tail` takes what the chain's tail proposes, if that has a speculator.  `ngram` needs no
    model: it drafts what this client's texts and the target's own tokens repeat.  A directory, hub id or bundled name
    is a draft model; with `+ngram` behind it, both draft into one tree.
    `auto` is `ngram` with a draft model that has the target's vocabulary: a bundled one, or its family's if that is on
    this machine; `ngram` alone if there is none or no torch.  It never downloads anything.

    Raises BadRequest for any other name, ModelError for a bad directory, Mismatch if draft and target have different
    tokenizers.
    """
    return choose_drafter(name, target, str(target), device, dtype, hub)[0]


def choose_drafter(
    name: str, target: Path, model: str, device: str = "cpu", dtype: str = "float32", hub: HubOptions = DEFAULT_HUB
) -> tuple[Drafter, DraftChoice]:
    """Load a drafter as `load_drafter` does, and say which it is and why; `model` is the target as users name it."""
    named = DraftChoice(name, "as named")
    if name == "none":
        return NoneDrafter(), named
    if name == "ngram":
        return UnionDrafter(_ngram(), name), named
    if name in (TAIL, TAIL + WITH_NGRAM):
        return TailDrafter() if name == TAIL else UnionDrafter([*_ngram(), TailDrafter()], name), named
    if name == "auto":
        return _auto(target, model, device, dtype, hub)
    if name.endswith(WITH_NGRAM):
        loaded = _model(name.removesuffix(WITH_NGRAM), target, device, dtype, hub)
        return UnionDrafter([*_ngram(), loaded], name), named
    return _model(name, target, device, dtype, hub), named


def _ngram() -> list[UnionMember]:
    return [SuffixDrafter(), TokenRecyclingDrafter()]


def _auto(target: Path, model: str, device: str, dtype: str, hub: HubOptions) -> tuple[Drafter, DraftChoice]:
    """Choose a drafter for the target, and log the choice: as a warning if it is a fallback."""
    drafter = UnionDrafter(_ngram(), "ngram")
    found = find_draft(target, model, hub)
    if isinstance(found, MissingDraft):
        choice = _fall_back(f"because {found.why}")
    else:
        name = found.name
        try:
            loaded = _load_model(found.folder, target, device, dtype)
            drafter = UnionDrafter([*_ngram(), loaded], "auto")
            choice = DraftChoice(name + WITH_NGRAM, f"because {name} has the tokenizer of {model}", automatic=True)
        except (BadRequest, ModelError) as error:
            choice = _fall_back(f"because {error}")
    log.log(logging.WARNING if choice.fallback else logging.INFO, "%s", choice)
    return drafter, choice


def _fall_back(why: str) -> DraftChoice:
    return DraftChoice("ngram", why, automatic=True, fallback=True)


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
