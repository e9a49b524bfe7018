"""Flags that several commands share, and the client that they describe."""

import argparse
import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from treeswarm.errors import BadRequest, ModelError, SwarmError
from treeswarm.grammar.notation import lark_from
from treeswarm.keys import read_swarm_key
from treeswarm.model_files import HubOptions
from treeswarm.model_sources.generation_config import GenerationDefaults, rules_from
from treeswarm.protocol.records import NodeRecord
from treeswarm.protocol.text_rules import Grammar
from treeswarm.registry import check_swarm_key, client_registry
from treeswarm.transport.seam import Transport
from treeswarm.transport.tls import Security
from treeswarm_client.chain.wait_events import ChainWait
from treeswarm_client.cli.render.steps import Rename, can_redraw, spinner
from treeswarm_client.cli.render.wait_notice import WaitNotice
from treeswarm_client.client import SwarmClient
from treeswarm_client.client_settings import DEFAULT_PATIENCE_S, registry_spec
from treeswarm_client.discovery.overview import clean
from treeswarm_client.generation.run import TreeSize

OPENING = "finding nodes, loading the draft"
"""What a command says while a client is being opened."""
log = logging.getLogger(__name__)

# Number of models that an error names: the hint must not become longer than the error itself.
MAX_NAMED_MODELS = 5
# Seconds that an error waits for these names, and a question for the records that make it needless.
RECORDS_S = 3.0


def add_client_flags(parser: argparse.ArgumentParser, *, patience_s: float = DEFAULT_PATIENCE_S) -> None:
    """Add the flags for the model, the nodes and the drafting."""
    parser.add_argument(
        "--model",
        help="model directory, GGUF file, hub id, `smollm2` or `demo`; only config and tokenizer are read (required)",
    )
    add_revision_flag(parser)
    add_route_flags(parser)
    parser.add_argument(
        "--draft",
        default="auto",
        metavar="DRAFT",
        help="drafter: a draft model (directory, hub id or `demo-draft`); the same with `+ngram`, which adds n-gram "
        "lookup; ngram (n-gram lookup only, needs no torch); tail (what the chain's last node proposes, if it has a "
        "speculator) or tail+ngram; none; or auto (default): tail+ngram if the last node has a speculator, else ngram "
        "with the small model of the target's family, if that is downloaded, else ngram",
    )
    parser.add_argument(
        "--draft-device",
        default="auto",
        metavar="DEVICE",
        help="device of the draft model: cpu, cuda, mps or auto (default), a GPU if there is one",
    )
    parser.add_argument(
        "--tree-size",
        type=parse_tree_size,
        default="auto",
        metavar="N",
        help="draft nodes per traversal; 0 for plain decoding; auto (default): chosen each round for most tokens per "
        "second",
    )
    parser.add_argument(
        "--drive",
        default="auto",
        metavar="WHERE",
        help="where the generation loop runs: self, here; a node that offers it, by HOST:PORT or the first digits of "
        "its id: there, with its drafter; auto (default): on the node from which a traversal is clearly faster by "
        "measured distances, else here",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="use only nodes that compute in this dtype"
    )
    parser.add_argument(
        "--quantization",
        choices=["none", "published", "int8", "int4", "nf4"],
        help="use only nodes with weights of this quantization",
    )
    parser.add_argument(
        "--emulate-link", metavar="SHAPE", help="delay what this client sends, as in delay=25ms,rate=100mbit"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=patience_s,
        metavar="SECONDS",
        help=f"seconds to wait until a node serves missing blocks again (default {patience_s:.0f})",
    )


RULE_FLAGS: dict[str, tuple[type, str, str]] = {
    "min_p": (float, "P", "sample from tokens that have this share of the likeliest one's probability (0: all)"),
    "repetition_penalty": (float, "X", "divide the logits of tokens that prompt or text has (1.0: off)"),
    "presence_penalty": (float, "X", "subtract this from the logits of tokens that the text has (0: off)"),
    "frequency_penalty": (float, "X", "subtract this for each time that the text has the token (0: off)"),
    "no_repeat_ngram_size": (int, "N", "let no N tokens occur twice in a row (0: off)"),
    "min_tokens": (int, "N", "end the text after N tokens at the earliest (0: off)"),
}
"""Flags that set fields of `TextRules`, each with its type, metavar and help."""


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """Add the flags for the length of the text and for sampling."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"maximum number of tokens to generate (default {max_new_tokens})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sampling temperature; 0 is greedy (default: greedy, unless the model's config says otherwise)",
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from this probability mass (1.0: all)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (0: all)")
    for name, (kind, metavar, words) in RULE_FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=words)
    add_form_flags(parser)
    add_generation_config_flag(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of sampling: the same seed repeats a text (default 0)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be repeated)"
    )


def add_form_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the form of the text, of which a command line has one at most."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="write JSON after the schema in this file")
    form.add_argument("--json-object", action="store_true", help="write a JSON object")
    form.add_argument("--regex", metavar="PATTERN", help="write a text that matches this pattern as a whole")
    form.add_argument("--choice", action="append", metavar="TEXT", help="write one of these texts (repeat the flag)")
    form.add_argument(
        "--grammar",
        type=Path,
        metavar="FILE",
        help="write a text of the grammar in this file (Lark or GBNF)",
    )


def named_grammar(args: argparse.Namespace) -> Grammar | None:
    """Return the form of the text that the command line names.  Raises BadRequest for a file that cannot be used."""
    if args.json_schema is not None:
        return Grammar("json_schema", _read_text(args.json_schema))
    if args.json_object:
        return Grammar("json_object")
    if args.regex is not None:
        return Grammar("regex", args.regex)
    if args.choice:
        return Grammar("choice", json.dumps(args.choice))
    return None if args.grammar is None else Grammar("lark", lark_from(_read_text(args.grammar)))


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} cannot be read ({error}): name a text file") from None


def add_generation_config_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says whether the publisher's sampling defaults are used."""
    parser.add_argument(
        "--generation-config",
        choices=["auto", "none"],
        default="auto",
        help="what decides about sampling that is not given: auto (default), the model's generation_config.json; none, "
        "nothing",
    )


def parse_tree_size(word: str) -> TreeSize:
    """Parse `auto` or a number of draft nodes."""
    if word == "auto":
        return "auto"
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"'{word}' is neither auto nor a number of draft nodes")
    return int(word)


def add_route_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the nodes are; `registry_of` refuses a command line without any of them."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--peers", metavar="HOST:PORT,…", help="addresses of exactly the nodes to use, each with or without its #PIN"
    )
    where.add_argument(
        "--registry",
        metavar="CODE",
        help="join code that a node prints, or HOST:PORT,… of any nodes, which know all others, or "
        "mqtts://USER:PASSWORD@HOST/NAMESPACE; or "
        "static:HOST:PORT,… (the same as --peers)",
    )
    add_swarm_key_flag(parser)


def add_revision_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the revision of a model."""
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub id (default: the main branch)"
    )


def add_swarm_key_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the key of a private swarm."""
    parser.add_argument(
        "--swarm-key", type=Path, metavar="PATH", help="key file of a private swarm (default: an open swarm)"
    )


def registry_of(args: argparse.Namespace) -> str:
    """Return the registry spec of a command line.  Raises BadRequest if it does not say where the nodes are."""
    if args.peers is None and args.registry is None:
        raise BadRequest(
            "no nodes are given: add --registry CODE, the join code that every node prints when it starts, or --peers "
            "HOST:PORT,HOST:PORT; `swarm-node demo` starts a swarm, `swarm demo` shows one on this machine"
        )
    return registry_spec(args.peers, args.registry)


def security_of(args: argparse.Namespace) -> Security:
    """Return the security of an open swarm, or of the private swarm whose key is given.

    Raises BadRequest for a bad key file, and for a key that is not that of the join code given.
    """
    key = read_swarm_key(args.swarm_key) if args.swarm_key else None
    if args.peers is not None or args.registry is not None:
        check_swarm_key(registry_of(args), key)
    return Security(swarm_key=key)


def open_transport(args: argparse.Namespace) -> Transport:
    """Return a transport for the swarm of a command line.  Raises BadRequest for a bad key file."""
    security = security_of(args)
    # Imported here, so that a wrong command line is refused before gRPC is loaded.
    from treeswarm.transport.grpc import GrpcTransport  # noqa: PLC0415

    return GrpcTransport(security=security)


def client_of(args: argparse.Namespace, **options: Any) -> SwarmClient:
    """Return a client for the flags of `add_client_flags`, which are checked, with further `options`."""
    return SwarmClient(
        model=args.model,
        registry=registry_of(args),
        draft=args.draft,
        tree_size=args.tree_size,
        draft_device=args.draft_device,
        emulate_link=args.emulate_link,
        swarm_key=security_of(args).swarm_key,
        patience=args.patience,
        dtype=args.dtype,
        quantization=args.quantization,
        hub=HubOptions(args.revision),
        drive=args.drive,
        **options,
    )


@contextlib.asynccontextmanager
async def open_client(args: argparse.Namespace) -> AsyncIterator[SwarmClient]:
    """Open a client for the flags of `add_client_flags`.

    Raises what opening a client raises.  The error for a model that cannot be found also names the models served.
    """
    notes = Console(stderr=True, highlight=False)
    on_wait = WaitNotice(notes, midline=sys.stdout.isatty()) if notes.is_terminal else _OpeningLog()
    client = client_of(args, on_wait=on_wait)
    async with contextlib.AsyncExitStack() as stack:
        try:
            with show_progress(OPENING):
                await stack.enter_async_context(client)
        except ModelError as error:
            raise _naming_served_models(error, await _served_models(args)) from None
        if client.draft_choice.automatic and not args.json:
            notes.print(str(client.draft_choice), style="dim", markup=False, soft_wrap=True)
        if "temperature" in args and (decided := describe_defaults(args, client.generation_defaults)) and not args.json:
            notes.print(decided, style="dim", markup=False, soft_wrap=True)
        yield client


@dataclass(eq=False)
class _OpeningLog:
    """Logs, where there is no terminal, that an opening client waits: once, so that no script waits in silence."""

    _said: bool = False

    def __call__(self, wait: ChainWait) -> None:
        if not wait.session and wait.reason is not None and not self._said:
            self._said = True
            reason = clean(str(wait.reason).rpartition(": ")[0] or str(wait.reason))
            log.warning("%s: waiting for up to %.0f s more", reason, wait.remaining_s)


@contextlib.contextmanager
def report_served_models(args: argparse.Namespace) -> Iterator[None]:
    """Let an error for a model that cannot be found also name the models that the swarm serves."""
    try:
        yield
    except ModelError as error:
        raise _naming_served_models(error, asyncio.run(_served_models(args))) from None


def _naming_served_models(error: ModelError, served: Sequence[str]) -> ModelError:
    return ModelError(f"{error} (this swarm serves {', '.join(served)})" if served else str(error))


@contextlib.contextmanager
def show_progress(text: str) -> Iterator[Rename]:
    """Show on a terminal what is being done and for how long, and yield a function that changes the text."""
    console = Console(stderr=True, highlight=False)
    if not can_redraw(console):
        yield lambda _: None
        return
    with spinner(console, text) as rename:
        yield rename


def sampling_of(args: argparse.Namespace, defaults: GenerationDefaults) -> dict[str, Any]:
    """Return the flags of `add_sampling_flags` as options of `SwarmClient.stream`.

    `defaults` are those of the model's publisher.  With a temperature they say what else is not given; without one, how
    the text is chosen at all.
    """
    always = {name: getattr(args, name) for name in ("max_new_tokens", "seed", "stop")}
    if args.generation_config == "none":
        defaults = GenerationDefaults()
    given = named_sampling(args)
    settings = {**(defaults.settings if "temperature" in given else defaults.transformers_settings()), **given}
    rules = {**defaults.rules, **named_rules(args)}
    return {**always, **settings, "rules": rules_from(rules, temperature=settings["temperature"])}


def named_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling that the command line names, as options of `SwarmClient.stream`."""
    values = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    return {name: value for name, value in values.items() if value is not None}


def named_rules(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `TextRules` that the command line names."""
    rules = {name: getattr(args, name) for name in RULE_FLAGS if getattr(args, name) is not None}
    grammar = named_grammar(args)
    return rules if grammar is None else {**rules, "grammar": grammar}


def describe_defaults(args: argparse.Namespace, defaults: GenerationDefaults) -> str | None:
    """Return what the model's generation config decides about a text's tokens, for people, or None if it is nothing."""
    options = sampling_of(args, defaults)
    decided = [f"{name} {options[name]:g}" for name in ("temperature", "top_p", "top_k") if name in options]
    own = {name: value for name, value in defaults.rules.items() if name not in named_rules(args)}
    ruled = [f"{name} {value:g}" for name, value in own.items() if getattr(options["rules"], name) == value]
    if args.generation_config == "none" or not (
        ruled or (defaults.samples and "temperature" not in named_sampling(args))
    ):
        return None
    words = ", ".join([*(decided if options["temperature"] else ["greedy"]), *ruled])
    return f"as the model's generation_config.json says: {words} (--generation-config none ignores it)"


async def _served_models(args: argparse.Namespace) -> list[str]:
    """Return the names of the swarm's models as its nodes announce them, or none if no node answers."""
    return sorted({clean(record.name) for record in await first_records(args)})[:MAX_NAMED_MODELS]


async def first_records(args: argparse.Namespace, model: str | None = None) -> list[NodeRecord]:
    """Return the records of the swarm that the flags name, or none if no node answers within some seconds.

    `model` is the digest of a model's config, or None for every model.
    """
    transport = open_transport(args)
    records: list[NodeRecord] = []
    with contextlib.suppress(SwarmError, TimeoutError):
        async with asyncio.timeout(RECORDS_S):
            registry = await client_registry(registry_of(args), model, transport)
            records = [sealed.record for sealed in await registry.snapshot()]
            await registry.close()
    await transport.close()
    return records
