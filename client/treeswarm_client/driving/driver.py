"""The driver of a node: it runs the generation loop for clients, as a gateway does, and sends them the tokens.

It is a client of the node's own swarm, opened for the first text and closed after a time without one.
"""

import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from treeswarm.errors import BadRequest, LinkBroken, ModelError, Refused, SwarmError, TransportError
from treeswarm.model_files import HubOptions
from treeswarm.protocol.address import host_of, without_pin
from treeswarm.protocol.drive_messages import (
    MAX_REPAIRS,
    Drive,
    DrivenHop,
    DrivenTokens,
    DrivenTraversal,
    DriverKind,
)
from treeswarm.protocol.messages import FaultCode
from treeswarm.protocol.prefix import SCOPE_BYTES
from treeswarm.protocol.text_rules import TextRules
from treeswarm.protocol.version import check_version
from treeswarm.transport.seam import Stream
from treeswarm_client.client import SwarmClient
from treeswarm_client.drafters.selection.automatic import DraftChoice
from treeswarm_client.drafters.selection.find_draft import FoundDraft, find_draft
from treeswarm_client.driving.choice import kind_of_draft
from treeswarm_client.generation.run import Run, Token

log = logging.getLogger(__name__)

LOOK_EVERY_S = 30.0


@dataclass(frozen=True)
class DriverLimits:
    """Limits, each of which bounds memory or time that clients could otherwise take."""

    texts: int = 8
    """Number of texts driven at once."""
    texts_per_host: int = 4
    """Number of texts driven at once for one IP address."""
    idle_s: float = 600.0
    """Seconds without a text after which the driver's own client is closed, and its memory freed."""
    send_s: float = 30.0
    """Seconds within which a client must take what it is sent."""


@dataclass(eq=False)
class TextDriver:
    """Drives texts on one node; `run` must be running."""

    make_client: Callable[[], SwarmClient]
    """Returns a client of the node's swarm that is not open yet, and drives by itself."""
    limits: DriverLimits = DriverLimits()
    kind: DriverKind = DriverKind.TABLES
    """What it announces of the drafts that it has."""
    hosts: Counter[str] = field(default_factory=Counter)
    """Number of texts driven now, by the host of their client."""
    driven: int = 0
    """Number of texts driven since start."""
    _client: SwarmClient | None = None
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _closing: bool = False
    _used_at: float = 0.0
    """Time of the loop's clock at which the client was last in use."""

    @property
    def is_open(self) -> bool:
        """Whether the client is open, for texts that are driven now or were lately."""
        return self._client is not None

    async def drive(self, request: Drive, stream: Stream) -> None:
        """Drive one text and send its tokens on `stream`, until its end.  Cancelling ends it at once.

        Raises Refused with the reason if the text is not driven, and the SwarmErrors of generating.
        """
        host = host_of(stream.peer)
        self._admit(request, host)
        self.hosts[host] += 1
        try:
            async with self._borrowed_client() as client:
                self.driven += 1
                await self._send_text(request, client, stream)
        except TransportError:
            raise  # the client has gone
        except SwarmError as error:
            if not isinstance(error, Refused):
                log.warning("a text could not be driven to its end: %s", error)
            raise
        except asyncio.CancelledError:
            if not self._closing:
                raise
            raise Refused("this node is about to leave: drive elsewhere", FaultCode.DRAINING) from None
        finally:
            self.hosts -= Counter([host])

    async def run(self) -> None:
        """Close the client whenever it was not used for a while, until cancelled."""
        while True:
            await asyncio.sleep(min(LOOK_EVERY_S, self.limits.idle_s))
            idle_s = asyncio.get_running_loop().time() - self._used_at
            if not self.hosts and idle_s >= self.limits.idle_s:
                await self.close()

    async def close(self) -> None:
        """Close the client, and end the texts that it drives."""
        async with self._opening:
            client, self._client, self._closing = self._client, None, True
            try:
                if client is not None:
                    await client.__aexit__(None, None, None)
            finally:
                self._closing = False

    def _admit(self, request: Drive, host: str) -> None:
        """Raise Refused if the text is not driven here, with the first rule that it breaks."""
        check_version("the client", request.version)
        if self.hosts.total() >= self.limits.texts:
            raise Refused(f"this node drives {self.hosts.total()} texts and takes no more", FaultCode.FULL)
        if self.hosts[host] >= self.limits.texts_per_host:
            raise Refused(
                f"this node drives {self.hosts[host]} texts for {host}, the most that one address may have",
                FaultCode.FULL,
            )

    @contextlib.asynccontextmanager
    async def _borrowed_client(self) -> AsyncIterator[SwarmClient]:
        """Yield the open client; open it for the first text."""
        async with self._opening:
            if self._client is None:
                client = self.make_client()
                await client.__aenter__()
                self._client = client
            client = self._client
        try:
            yield client
        finally:
            self._used_at = asyncio.get_running_loop().time()

    async def _send_text(self, request: Drive, client: SwarmClient, stream: Stream) -> None:
        if client.target.numerics != request.numerics:
            raise Refused(
                "this node drives texts of another numerics class than the client asks for: "
                f"{client.target.numerics.difference(request.numerics)}",
                FaultCode.MISMATCH,
            )
        teller = _Teller(request.text)
        traversal: list[Token] = []
        async with aclosing(_begin(request, client)) as run:
            async for token in run:
                traversal.append(token)
                if not token.following:
                    await self._send(stream, teller.message(run, traversal))
                    traversal = []

    async def _send(self, stream: Stream, message: DrivenTokens) -> None:
        try:
            async with asyncio.timeout(self.limits.send_s):
                await stream.send(message)
        except TimeoutError:
            raise LinkBroken(f"{stream.peer} took no tokens for {self.limits.send_s:.0f} s") from None


def find_kind(draft: str, folder: Path, model: str, hub: HubOptions) -> DriverKind:
    """Return what a driver announces that drafts as `draft` says, for the model in `folder`; it blocks for a moment.

    `auto` takes what the tail proposes or a draft model that is on this machine, as it does for every client.
    """
    if draft != "auto":
        return kind_of_draft(DraftChoice(draft, "as named"))
    try:
        found = find_draft(folder, model, hub)
    except ModelError:  # of the tokenizer; the text driven first says so
        return DriverKind.TAIL
    return DriverKind.MODEL if isinstance(found, FoundDraft) else DriverKind.TAIL


def _begin(request: Drive, client: SwarmClient) -> Run:
    """Start the generation.  Raises Refused for what the model cannot continue."""
    settings = request.settings
    auto: Literal["auto"] = "auto"
    try:
        return client.stream(
            request.prompt.tolist(),
            max_new_tokens=request.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=settings.seed,
            sample=settings.sample,
            tree_size=auto if request.tree_size is None else request.tree_size,
            stop_token_ids=request.stop_ids.tolist(),
            ignore_eos=True,
            rules=TextRules() if request.rules is None else request.rules.rules,
            generated_tokens=0 if request.rules is None else len(request.prompt) - request.rules.prompt_length,
            # Nobody else knows a secret of its own, so nothing is shared.
            prefix_secret=request.prefix_secret or secrets.token_bytes(SCOPE_BYTES),
        )
    except BadRequest as error:
        raise Refused(str(error), FaultCode.MALFORMED) from None


@dataclass(eq=False)
class _Teller:
    """Makes the messages about one text: what is new since the last one."""

    text: bytes
    _traversals: int = 0
    _drafted: int = 0
    _accepted: int = 0
    _misses: int = 0
    _repairs: int = 0
    _draft_s: float = 0.0
    _hops: tuple[DrivenHop, ...] = ()

    def message(self, run: Run, tokens: list[Token]) -> DrivenTokens:
        """Return the message about the tokens of one traversal."""
        assert run.chain is not None
        hops = tuple(DrivenHop(hop.node, without_pin(hop.address), hop.span) for hop in run.chain.hops)
        changed, self._hops = hops if hops != self._hops else (), hops
        return DrivenTokens(
            self.text,
            np.array([token.id for token in tokens], np.uint32),
            np.array([token.logprob for token in tokens], np.float32),
            self._traversal(run),
            changed,
            run.prefix_tokens,
        )

    def _traversal(self, run: Run) -> DrivenTraversal:
        recorder = run.recorder
        times = recorder.traversal_times[self._traversals :]
        costs = DrivenTraversal(
            seconds_us=_microseconds(sum(time.seconds for time in times)),
            compute_us=_microseconds(sum(time.compute_s for time in times)),
            queue_us=_microseconds(sum(time.queue_s for time in times)),
            draft_us=_microseconds(recorder.draft_s - self._draft_s),
            rows=sum(time.rows for time in times),
            drafted=recorder.drafted - self._drafted,
            accepted=recorder.accepted - self._accepted,
            missed=recorder.misses > self._misses,
            repairs=min(MAX_REPAIRS, len(recorder.recoveries) - self._repairs),
        )
        self._traversals, self._drafted, self._accepted = recorder.traversals, recorder.drafted, recorder.accepted
        self._misses, self._repairs, self._draft_s = recorder.misses, len(recorder.recoveries), recorder.draft_s
        return costs


def _microseconds(seconds: float) -> int:
    return max(0, round(1e6 * seconds))
