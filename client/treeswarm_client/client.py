"""The library: a client of a swarm, asyncio inside, a thin synchronous face outside."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tokenizers import Tokenizer

from treeswarm.errors import BadRequest, SwarmError, Unreachable
from treeswarm.identity import config_digest
from treeswarm.messages import MAX_CROWN, MAX_ROWS, SEGMENT_BYTES, Description
from treeswarm.model_files import ModelShape, load_tokenizer, read_config, read_shape, resolve_model
from treeswarm.registry import parse_registry
from treeswarm.sampling import SamplingSettings
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Transport
from treeswarm_client.chain import describe, open_chain
from treeswarm_client.drafters import load_drafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.generation import Generation, Limits
from treeswarm_client.route import Route, plan_route
from treeswarm_client.session import ClientSession
from treeswarm_client.stats import Meter, Stats
from treeswarm_client.text import TextStream

LARGEST_TREE = 2048
DEFAULT_TREE_SIZE = 64


@dataclass(frozen=True)
class Token:
    """One committed token, as it streams."""

    id: int
    text: str
    """What this token adds to the text; may be empty while a character is incomplete."""
    logprob: float
    traversal: int
    """Tokens of one traversal came in one round trip."""


@dataclass(eq=False)
class Run:
    """A generation that streams: iterate it, then read `stats`.  After an error the text so far is kept."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    stats: Stats | None = None
    route: Route | None = None
    error: SwarmError | None = None
    _tokens: AsyncIterator[Token] | None = None

    def __aiter__(self) -> AsyncIterator[Token]:
        assert self._tokens is not None
        return self._tokens


@dataclass(eq=False)
class SwarmClient:
    """A client of the nodes at `peers` that serve `model`.

        async with SwarmClient(model="demo", peers="127.0.0.1:4001,127.0.0.1:4002", draft="demo-draft") as client:
            async for token in client.stream("def main():"):
                print(token.text, end="")

    `model` is a directory, a hub id or `demo`; only its config and tokenizer are read.  `draft` is `none` or a model.
    Raises, on entering, what is wrong with the model, the draft or the addresses.
    """

    model: str
    peers: str | Sequence[str] | None = None
    registry: str | None = None
    draft: str = "none"
    tree_size: int = DEFAULT_TREE_SIZE
    draft_device: str = "cpu"
    emulate_link: str | None = None
    transport: Transport | None = None
    """For tests; gRPC otherwise."""
    drafter: Drafter | None = None
    """A drafter of one's own, instead of `draft`."""
    _opened: "_Opened | None" = None

    async def __aenter__(self) -> Self:
        if not 0 <= self.tree_size <= min(LARGEST_TREE, MAX_CROWN - 1):
            raise BadRequest(f"tree size {self.tree_size} is out of range: give 0 (plain decoding) up to {LARGEST_TREE}")
        folder = await asyncio.to_thread(resolve_model, self.model)
        config = read_config(folder)
        tokenizer = load_tokenizer(folder)
        drafter = self.drafter or await asyncio.to_thread(
            load_drafter, "none" if self.tree_size == 0 else self.draft, folder, self.draft_device
        )
        transport = self.transport or GrpcTransport()
        if self.emulate_link:
            transport = EmulatedTransport(transport, LinkShape.parse(self.emulate_link))
        self._opened = _Opened(folder, read_shape(folder), config_digest(config), tokenizer, drafter, transport)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        opened, self._opened = self._opened, None
        if opened is not None and self.transport is None:
            await opened.transport.close()
