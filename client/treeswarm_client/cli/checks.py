"""Find the mistakes of a command line at once: before torch or gRPC is loaded and before any node is asked.

Each check reads the command line and small files alone, and raises BadRequest or ModelError.
"""

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from treeswarm.errors import BadRequest
from treeswarm.extras import require
from treeswarm.model_files import HubOptions, check_model_name, is_at_hand, is_path, read_shape, resolve_model
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import TextRules
from treeswarm.registry import check_client_spec
from treeswarm.transport.emulated import LinkShape
from treeswarm_client.chat_template import MessageDict
from treeswarm_client.cli.flags import named_rules, named_sampling, registry_of, security_of
from treeswarm_client.cli.render.download import show_download
from treeswarm_client.client_settings import check_drive, largest_tree
from treeswarm_client.drafters.selection.automatic import MODELLESS, WITH_NGRAM
from treeswarm_client.prompt_encoder import check_request, load_prompt_encoder


def check_route(args: argparse.Namespace) -> str:
    """Check the flags of `add_route_flags`, and return the registry spec."""
    spec = registry_of(args)
    check_client_spec(spec)
    security_of(args)
    return spec


def check_client_flags(args: argparse.Namespace) -> None:
    """Check the flags of `add_client_flags`.

    Whether a model without a path exists may have to be asked of the hub or of the swarm, which is left for later.
    """
    check_route(args)
    if args.model is None:
        where = f"--peers {args.peers}" if args.peers else f"--registry {shlex.quote(args.registry)}"
        raise BadRequest(f"no model is given: add --model NAME; `swarm models {where}` lists what a swarm serves")
    if is_path(args.model):  # A name that is no path may be one of the swarm's: its error names those that are served.
        check_model_name(args.model)
    if is_at_hand(args.model):
        read_shape(resolve_model(args.model))
    _check_draft(args.draft, args.tree_size)
    check_drive(args.drive)
    if args.emulate_link:
        LinkShape.parse(args.emulate_link)
    if not 0.0 <= args.patience < math.inf:
        raise BadRequest(f"--patience is {args.patience:g}: give the seconds to wait, 0 or more")


def check_sampling_flags(args: argparse.Namespace) -> None:
    """Check the flags of `add_sampling_flags`."""
    check_at_least("--max-new-tokens", args.max_new_tokens, 1)
    SamplingSettings(**named_sampling(args), seed=args.seed)
    TextRules(**named_rules(args))
    if not all(args.stop):
        raise BadRequest("--stop is empty: leave it out")


def check_at_least(flag: str, value: int | None, least: int) -> None:
    """Check a number that a flag gives; None stands for a default."""
    if value is not None and value < least:
        raise BadRequest(f"{flag} is {value}: give at least {least}")


def check_prompt(args: argparse.Namespace, prompt: str) -> None:
    """Check that a prompt is not empty, and that it and the new tokens fit into the model's context.

    This reads the model's tokenizer, which a client needs anyway.
    """
    folder = fetch_model(args)
    encoder, shape = load_prompt_encoder(args.model, folder), read_shape(folder)
    check_request(encoder.encode(prompt), args.max_new_tokens, shape.vocab_size, shape.max_positions)


def check_chat(args: argparse.Namespace, messages: Sequence[MessageDict]) -> None:
    """Check that the model can chat, and that the beginning of a conversation fits into its context."""
    folder = fetch_model(args)
    encoder, shape = load_prompt_encoder(args.model, folder), read_shape(folder)
    check_request(encoder.encode_chat(messages), args.max_new_tokens, shape.vocab_size, shape.max_positions)


def fetch_model(args: argparse.Namespace) -> Path:
    """Return the folder of the model's small files, and show how far they are while they are fetched or made."""
    with show_download(args.model) as progress:
        return resolve_model(args.model, hub=HubOptions(args.revision), progress=progress)


def _check_draft(draft: str, tree_size: int | str) -> None:
    largest_tree(tree_size)  # type: ignore[arg-type]  # argparse has made it `auto` or a number
    if draft in MODELLESS or tree_size == 0:
        return
    name = draft.removesuffix(WITH_NGRAM)
    check_model_name(name)
    try:
        require("draft", f"the draft model {name}")
    except BadRequest as error:
        raise BadRequest(f"{error}, or draft without a model: --draft ngram") from None
