"""Drafters: they guess which tokens the target will generate."""

import logging
from dataclasses import dataclass
from pathlib import Path

from treeswarm.errors import BadRequest, Mismatch
from treeswarm.extras import install_command
from treeswarm.model_files import DEFAULT_HUB, HubOptions, read_shape, resolve_model, tokenizer_digest
from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.drafters.suffix import SuffixDrafter
from treeswarm_client.drafters.token_recycling import TokenRecyclingDrafter
from treeswarm_client.drafters.union import UnionDrafter, UnionMember

log = logging.getLogger(__name__)

KNOWN_DRAFTS = ("demo-draft",)
"""Bundled draft models, for targets with the same tokenizer."""
WITH_NGRAM = "+ngram"
MODELLESS = ("none", "ngram", "auto")
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
        words = f"{model} and {ngrams}" if plus else ngrams if model == "ngram" else model
        return f"draft: {words}, {self.why}"

    def as_dict(self) -> dict[str, str]:
        """Return what programs are told."""
        return {"name": self.name, "why": self.why}


def load_drafter(
    name: str, target: Path, device: str = "cpu", dtype: str = "float32", hub: HubOptions = DEFAULT_HUB
) -> Drafter:
    """Load the drafter `name` for a target (a model directory).

    `none` drafts nothing.  `ngram` needs no model: it drafts what this client's texts and the target's own tokens
    repeat.  A directory, hub id or bundled name is a draft model; with `+ngram` behind it, both draft into one tree.
    `auto` is a bundled draft model that fits this target, with `ngram`, or `ngram` alone if there is none or no torch.

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
    if name == "auto":
        return _auto(target, model, device, dtype)
    if name.endswith(WITH_NGRAM):
        loaded = _model(name.removesuffix(WITH_NGRAM), target, device, dtype, hub)
        return UnionDrafter([*_ngram(), loaded], name), named
    return _model(name, target, device, dtype, hub), named


def _ngram() -> list[UnionMember]:
    return [SuffixDrafter(), TokenRecyclingDrafter()]


def _auto(target: Path, model: str, device: str, dtype: str) -> tuple[Drafter, DraftChoice]:
    """Choose a drafter for the target, and log the choice: as a warning if it is a fallback."""
    draft = next((name for name in KNOWN_DRAFTS if _fits(resolve_model(name), target)), None)
    drafter = UnionDrafter(_ngram(), "ngram")
    if draft is None:
        choice = _fall_back(f"because no draft model is known for {model}: name one of the same family with --draft")
    else:
        try:
            drafter = UnionDrafter([*_ngram(), _model(draft, target, device, dtype)], "auto")
            choice = DraftChoice(draft + WITH_NGRAM, f"because {draft} has the tokenizer of {model}", automatic=True)
        except BadRequest as error:
            choice = _fall_back(f"because {error}")
    log.log(logging.WARNING if choice.fallback else logging.INFO, "%s", choice)
    return drafter, choice


def _fall_back(why: str) -> DraftChoice:
    return DraftChoice("ngram", why, automatic=True, fallback=True)


def _fits(draft: Path, target: Path) -> bool:
    # Vocabulary sizes are compared first, because reading a tokenizer takes a while.
    same_size = read_shape(draft).vocab_size == read_shape(target).vocab_size
    return same_size and tokenizer_digest(draft) == tokenizer_digest(target)


def _model(name: str, target: Path, device: str, dtype: str, hub: HubOptions = DEFAULT_HUB) -> UnionMember:
    folder = resolve_model(name, hub=hub)
    if tokenizer_digest(folder) != tokenizer_digest(target):
        raise Mismatch(
            f"the tokenizer of draft model '{name}' differs from the target's, so its guesses would be other tokens: "
            "name a draft model of the same family, or ngram"
        )
    try:
        from treeswarm_client.drafters.model import ModelDrafter  # noqa: PLC0415  # brings torch
    except ImportError as error:
        raise BadRequest(
            f"a draft model needs torch, but {error.name} is missing: {install_command('draft')}, or --draft ngram"
        ) from error
    folder = resolve_model(name, weights=True, hub=hub)
    return ModelDrafter.load(folder, device=device, dtype=dtype, vocab_size=read_shape(target).vocab_size)
