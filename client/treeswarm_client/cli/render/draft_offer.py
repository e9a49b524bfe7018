"""Ask once, at a terminal, whether to download the draft model that `--draft auto` would use."""

import argparse
import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from treeswarm.errors import BadRequest, ModelError
from treeswarm.identity import config_digest
from treeswarm.model_files import HubOptions, read_config, resolve_model
from treeswarm.model_sources.cache import cache_folder
from treeswarm_client.cli.checks import fetch_model
from treeswarm_client.cli.flags import first_records
from treeswarm_client.cli.render.download import show_download
from treeswarm_client.drafters.selection.automatic import TailOffer
from treeswarm_client.drafters.selection.families import DraftFamily
from treeswarm_client.drafters.selection.find_draft import MissingDraft, find_draft
from treeswarm_client.drafters.selection.vocabulary import share_vocabulary

YES = ("", "y", "yes")
NO = ("n", "no")


@dataclass(frozen=True)
class Circumstances:
    """What decides, besides the model, whether a question is asked."""

    draft: str
    """Value of `--draft`."""
    plain: bool
    """Whether nothing is drafted, because the tree size is 0."""
    at_terminal: bool
    """Whether a user can read the question and answer it."""


def may_ask(now: Circumstances) -> bool:
    """Return whether the user may be asked about a download.  Pure."""
    return now.draft == "auto" and not now.plain and now.at_terminal


def offer_draft(args: argparse.Namespace) -> None:
    """Download the draft model of the target's family if it is missing and the user at the terminal agrees.

    Where the tail of the swarm proposes trees, nothing is asked.  A "no" is remembered.  Where nobody can be asked,
    nothing is downloaded: the line that names the draft then says how to get it.  Raises what finding the target's
    config and tokenizer raises.
    """
    if not may_ask(_circumstances(args)) or _is_offline():
        return
    target = fetch_model(args)
    hub = HubOptions(args.revision).for_another_model()
    missing = find_draft(target, args.model, hub)
    if not isinstance(missing, MissingDraft) or missing.family is None or missing.family.draft is None:
        return
    name, refused = missing.family.draft, cache_folder("refused-drafts", missing.family.draft.replace("/", "--"))
    notes = Console(stderr=True, highlight=False)
    if refused.exists() or _tail_proposes(args, target):
        return
    if not _agrees(notes, missing.family, args.model):
        refused.mkdir(parents=True, exist_ok=True)
        return
    try:
        if not share_vocabulary(resolve_model(name, hub=hub), target):
            raise ModelError(f"the tokenizer of {name} differs from that of {args.model}")
        with show_download(name) as progress:
            resolve_model(name, weights=True, hub=hub, progress=progress)
    except (BadRequest, ModelError) as error:
        notes.print(f"{error}; going on without it", markup=False, soft_wrap=True)


def _tail_proposes(args: argparse.Namespace, target: Path) -> bool:
    """Return whether a tail of the model's swarm guesses well by itself, so that no draft model is needed."""
    records = asyncio.run(first_records(args, config_digest(read_config(target))))
    return any(record.speculator and not TailOffer.of(record).is_weak for record in records)


def _circumstances(args: argparse.Namespace) -> Circumstances:
    as_json = getattr(args, "json", False)
    return Circumstances(
        draft=args.draft,
        plain=args.tree_size == 0,
        at_terminal=sys.stdin.isatty() and sys.stderr.isatty() and not as_json,
    )


def _is_offline() -> bool:
    """Return whether the hub must not, or cannot, be asked.  Importing its client takes a while."""
    try:
        from huggingface_hub import constants  # noqa: PLC0415  # an optional dependency
    except ImportError:
        return True
    return bool(constants.HF_HUB_OFFLINE)


def _agrees(notes: Console, family: DraftFamily, model: str) -> bool:
    """Ask until the answer is yes or no.  The end of the input is a no."""
    question = (
        f"A small model can guess what {model} says next, which saves round trips. Download {family.draft} "
        f"({family.gigabytes:.1f} GB) once? [Y/n] "
    )
    while True:
        notes.print(question, end="", markup=False, soft_wrap=True)
        line = sys.stdin.readline()
        answer = line.strip().lower()
        if not line or answer in NO:
            return False
        if answer in YES:
            return True
