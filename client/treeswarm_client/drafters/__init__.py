"""Drafters: they guess which tokens the target will generate."""

import logging
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
    if name == "none":
        return NoneDrafter()
    if name == "ngram":
        return UnionDrafter(_ngram(), name)
    if name == "auto":
        return _auto(target, device, dtype)
    if name.endswith(WITH_NGRAM):
        return UnionDrafter([*_ngram(), _model(name.removesuffix(WITH_NGRAM), target, device, dtype, hub)], name)
    return _model(name, target, device, dtype, hub)


def _ngram() -> list[UnionMember]:
    return [SuffixDrafter(), TokenRecyclingDrafter()]


def _auto(target: Path, device: str, dtype: str) -> Drafter:
    draft = next((name for name in KNOWN_DRAFTS if _fits(resolve_model(name), target)), None)
    if draft is None:
        return UnionDrafter(_ngram(), "ngram")
    try:
        return UnionDrafter([*_ngram(), _model(draft, target, device, dtype)], "auto")
    except BadRequest as error:
        log.info("drafting without a model: %s", error)
        return UnionDrafter(_ngram(), "ngram")


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
