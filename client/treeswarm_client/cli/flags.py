"""Flags that several commands have, and the client they make."""

import argparse
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from treeswarm.errors import BadRequest, ModelError, SwarmError
from treeswarm.keys import read_swarm_key
from treeswarm.model_files import HubOptions
from treeswarm.registry import client_registry
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.tls import Security
from treeswarm_client.cli.render.wait_notice import WaitNotice
from treeswarm_client.client import SwarmClient
from treeswarm_client.client_settings import DEFAULT_PATIENCE_S, registry_spec
from treeswarm_client.discovery.overview import clean
from treeswarm_client.generation.run import TreeSize

# A hint must not be longer than the error it belongs to.
MODELS_NAMED = 5


def add_client_flags(made: argparse.ArgumentParser, *, patience_s: float = DEFAULT_PATIENCE_S) -> None:
    """Which model, where its nodes are, who drafts."""
    made.add_argument("--model", help="model directory, hub id or `demo`: its config and tokenizer are read (required)")
    add_revision_flag(made)
    add_route_flags(made)
    made.add_argument(
        "--draft",
        default="auto",
        metavar="WHO",
        help="who guesses: a draft model (directory, hub id or `demo-draft`), the same with `+ngram` behind it, ngram "
        "(no model, no torch), none, or auto: the draft model at hand with ngram, else ngram (default auto)",
    )
    made.add_argument("--draft-device", default="cpu", metavar="DEVICE", help="where the draft runs (default cpu)")
    made.add_argument(
        "--tree-size",
        type=parse_tree_size,
        default="auto",
        metavar="N",
        help="drafted nodes a traversal; 0 is plain decoding; auto (default): what brings most tokens a second",
    )
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="only nodes that compute in it")
    made.add_argument("--quantization", choices=["none", "int8", "nf4"], help="only nodes with such weights")
    made.add_argument("--emulate-link", metavar="SHAPE", help="delay what this client sends: delay=25ms,rate=100mbit")
    made.add_argument(
        "--patience",
        type=float,
        default=patience_s,
        metavar="SECONDS",
        help=f"wait so long for missing blocks to be served again (default {patience_s:.0f})",
    )


def add_sampling_flags(made: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """What text is wanted, and how much of it."""
    made.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"default {max_new_tokens}"
    )
    made.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    made.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1.0: off")
    made.add_argument("--top-k", type=int, default=0, metavar="K", help="default 0: off")
    made.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    made.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be given again)"
    )


def parse_tree_size(word: str) -> TreeSize:
    """`auto`, or a number of nodes."""
    if word == "auto":
        return "auto"
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"'{word}' is neither auto nor a number of nodes")
    return int(word)


def add_route_flags(made: argparse.ArgumentParser) -> None:
    """Where the nodes are; `registry_of` says so where neither is given."""
    where = made.add_mutually_exclusive_group()
    where.add_argument("--peers", metavar="HOST:PORT,…", help="the nodes' addresses, each with its #PIN or without")
    where.add_argument(
        "--registry",
        metavar="SPEC",
        help="HOST:PORT,… of any nodes, which tell of all others; or mqtts://USER:PASSWORD@HOST/NAMESPACE; or "
        "static:HOST:PORT,… (the same as --peers)",
    )
    add_swarm_key_flag(made)


def add_revision_flag(made: argparse.ArgumentParser) -> None:
    """Which state of a model."""
    made.add_argument("--revision", metavar="REV", help="of a hub id: branch, tag or commit (default: the main branch)")


def add_swarm_key_flag(made: argparse.ArgumentParser) -> None:
    """Which private swarm."""
    made.add_argument("--swarm-key", type=Path, metavar="PATH", help="key file of a private swarm (default: open)")


def registry_of(args: argparse.Namespace) -> str:
    """Where the nodes are.  Raises BadRequest with how to find out."""
    if args.peers is None and args.registry is None:
        raise BadRequest(
            "say where the nodes are: --registry HOST:PORT of any node (each prints it when it starts), or --peers "
            "HOST:PORT,HOST:PORT; `swarm-node demo` begins a swarm, `swarm demo` shows one on this machine"
        )
    return registry_spec(args.peers, args.registry)


def security_of(args: argparse.Namespace) -> Security:
    """Open, or the private swarm's.  Raises BadRequest for a bad key file."""
    return Security(swarm_key=read_swarm_key(args.swarm_key) if args.swarm_key else None)


def client_of(args: argparse.Namespace, **more: Any) -> SwarmClient:
    """What `add_client_flags` describes, and `more`.  Raises BadRequest with the next step."""
    registry = registry_of(args)
    if args.model is None:
        raise BadRequest("say which model: --model NAME; `swarm models --registry …` lists what a swarm serves")
    return SwarmClient(
        model=args.model,
        registry=registry,
        draft=args.draft,
        tree_size=args.tree_size,
        draft_device=args.draft_device,
        emulate_link=args.emulate_link,
        swarm_key=security_of(args).swarm_key,
        patience=args.patience,
        dtype=args.dtype,
        quantization=args.quantization,
        hub=HubOptions(args.revision),
        **more,
    )


@contextlib.asynccontextmanager
async def open_client(args: argparse.Namespace) -> AsyncIterator[SwarmClient]:
    """Entered.  Raises what entering raises; a model that cannot be found is told together with what is served."""
    notes = Console(stderr=True, highlight=False)
    told = {"on_wait": WaitNotice(notes, midline=sys.stdout.isatty())} if notes.is_terminal else {}
    client = client_of(args, **told)
    async with contextlib.AsyncExitStack() as stack:
        try:
            with show_progress("loading the draft, finding nodes"):
                await stack.enter_async_context(client)
        except ModelError as error:
            served = await _served(args)
            raise ModelError(f"{error} (this swarm serves {', '.join(served)})" if served else str(error)) from None
        yield client


@contextlib.contextmanager
def show_progress(words: str) -> Iterator[Callable[[str], None]]:
    """What takes some seconds is said meanwhile, where a person looks; call what it gives to say it in other words."""
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda _: None
        return
    with console.status(f"{words} …") as status:
        yield lambda words: status.update(f"{words} …")


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling_flags` describes, as `SwarmClient.stream` takes it."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    return {name: getattr(args, name) for name in names}


async def _served(args: argparse.Namespace) -> list[str]:
    """Names of the swarm's models, as its nodes call them; none where nobody tells any."""
    transport = GrpcTransport(security=security_of(args))
    names: list[str] = []
    with contextlib.suppress(SwarmError):
        registry = await client_registry(registry_of(args), None, transport)
        names = sorted({clean(sealed.record.name) for sealed in await registry.snapshot()})
        await registry.close()
    await transport.close()
    return names[:MODELS_NAMED]
