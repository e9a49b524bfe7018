"""Find the draft model of a target: bundled, or the small model of its family where that is on this machine."""

from dataclasses import dataclass, replace
from pathlib import Path

from treeswarm.errors import BadRequest, ModelError
from treeswarm.extras import install_command, missing_modules
from treeswarm.model_files import HubOptions, ModelShape, needed_files, read_shape, resolve_model
from treeswarm_client.drafters.selection.families import (
    DraftFamily,
    family_of,
    has_a_family,
    is_padding,
    padded_family_of,
)
from treeswarm_client.drafters.selection.vocabulary import read_vocabulary, share_vocabulary

KNOWN_DRAFTS = ("demo-draft",)
"""Bundled draft models, for targets with the same tokenizer."""


@dataclass(frozen=True)
class FoundDraft:
    """A draft model that is on this machine and has the target's vocabulary."""

    name: str
    """Name of the model, as `--draft` takes it."""
    folder: Path


@dataclass(frozen=True)
class MissingDraft:
    """The reason why no draft model is used."""

    why: str
    """Reason, as a sentence that begins with a small letter."""
    family: DraftFamily | None = None
    """Family whose draft could be downloaded, or None if nothing would help."""


def find_draft(target: Path, model: str, hub: HubOptions) -> FoundDraft | MissingDraft:
    """Find the draft model for the target in the directory `target`, called `model`.  Nothing is downloaded.

    Raises ModelError if the target's config or tokenizer cannot be read.
    """
    shape = read_shape(target)
    bundled = _bundled(target, shape)
    if bundled is not None:
        return bundled
    vocabulary = read_vocabulary(target) if has_a_family(shape) else None
    family = family_of(shape, vocabulary) if vocabulary is not None else None
    if family is None and vocabulary is not None and (padded := padded_family_of(shape, vocabulary)) is not None:
        named = f"name {padded.draft} with --draft" if padded.draft else "name a draft model with --draft"
        return MissingDraft(
            f"the vocabulary of {model} has {shape.vocab_size} rows, other models with its tokenizer ({padded.name}) "
            f"{' or '.join(map(str, padded.vocab_sizes))}: {named} if the rest is padding"
        )
    if family is None:
        return MissingDraft(f"no draft model is known for {model}: name one of the same family with --draft")
    if family.draft is None:
        return MissingDraft(f"no small model with the tokenizer of {model} ({family.name}) is published")
    if not family.is_smaller_than(shape):
        return MissingDraft(f"no model much smaller than {model} has its tokenizer")
    return _of_family(family, family.draft, target, model, hub)


def _bundled(target: Path, shape: ModelShape) -> FoundDraft | None:
    for name in KNOWN_DRAFTS:
        folder = resolve_model(name)
        # Vocabulary sizes are compared first, because reading a tokenizer takes a while.
        if is_padding(shape.vocab_size, [read_shape(folder).vocab_size]) and share_vocabulary(folder, target):
            return FoundDraft(name, folder)
    return None


def _of_family(family: DraftFamily, draft: str, target: Path, model: str, hub: HubOptions) -> FoundDraft | MissingDraft:
    """Return the family's draft model `draft` if it can be used on this machine as it is."""
    if missing_modules("draft"):
        command = install_command("draft")
        return MissingDraft(f"{draft}, which has the tokenizer of {model}, needs torch: {command}")
    folder = _copy_here(draft, target, hub)
    if folder is None:
        return MissingDraft(
            f"{draft}, which has the tokenizer of {model}, is not on this machine: --draft {draft}+ngram downloads it "
            f"once ({family.gigabytes:.1f} GB)",
            family,
        )
    if not share_vocabulary(folder, target):
        return MissingDraft(f"the tokenizer of {draft} differs from that of {model}: name a model with --draft")
    return FoundDraft(draft, folder)


def _copy_here(draft: str, target: Path, hub: HubOptions) -> Path | None:
    """Return the directory of a complete copy of `draft`: beside the target's own, or in the hub's cache; or None."""
    beside = target.absolute().parent / draft.rpartition("/")[2]
    if _is_complete(beside):
        return beside
    try:
        cached = resolve_model(draft, hub=replace(hub, local_files_only=True))
    except (BadRequest, ModelError):  # it is not in the cache, or there is no huggingface_hub
        return None
    return cached if _is_complete(cached) else None


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and all((folder / file).is_file() for file in needed_files(folder, None))
