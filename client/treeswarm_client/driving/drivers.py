"""Finds a driver for a text, receives what it drives, and finds another one when it is lost."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import BadRequest, Malformed, MissingBlocks, NodeLost, SwarmError, TransportError
from treeswarm.protocol.address import without_pin
from treeswarm.protocol.drive_messages import (
    MAX_DRIVEN_PROMPT,
    MAX_STOP_IDS,
    Drive,
    DrivenTokens,
    DriverKind,
)
from treeswarm.protocol.messages import SESSION_ID_BYTES
from treeswarm.protocol.prefix import SCOPE_BYTES, SWARM_SCOPE
from treeswarm.protocol.records import NodeRecord
from treeswarm.transport.ping import round_trip
from treeswarm.transport.seam import Transport
from treeswarm_client.chain.shared_prompt import PrefixScope
from treeswarm_client.discovery.route import Hop
from treeswarm_client.discovery.swarm_view import SwarmView
from treeswarm_client.driving.choice import DraftsHere, DriverOffer, choose_driver
from treeswarm_client.driving.remote_text import RemoteText
from treeswarm_client.generation.loop import Committed, FinishReason
from treeswarm_client.generation.run import DriverUse, Request, Run

log = logging.getLogger(__name__)

# Number of drivers that one text tries before its client drives by itself.
MOST_TRIES = 3
# Number of nodes to which `auto` measures the distance for a choice, and the seconds that all of them have to answer.
MOST_MEASURED, MEASURE_S = 16, 2.0
PINGS = 2
# Number of rows of a traversal by which places of the loop are compared: a usual tree, or one row without trees.
ROWS = 16
# Relative error of a network coordinate above which the distances that it predicts are not compared.
LARGEST_ERROR = 0.5


class Pick(NamedTuple):
    """The node that drives a text, or None for the client itself, and the reason as a clause."""

    hop: Hop | None
    why: str


@dataclass(eq=False)
class Drivers:
    """Drives the texts of one client on nodes, where that is faster or wanted."""

    wanted: str
    """`auto`, `self`, or the id or address of a node."""
    view: SwarmView
    transport: Transport
    own_draft: DriverKind
    """With what the client would draft."""
    vocab_size: int
    self_why: str = "as asked for"
    """Reason for `self`, as a clause."""

    def check(self) -> None:
        """Raise BadRequest if the node that is to drive is unknown or drives no texts."""
        if self.wanted in ("auto", "self"):
            return
        record = self._named()
        if record is None or record.driver is DriverKind.NONE:
            problem = "is no node of this model" if record is None else "drives no texts"
            offers = ", ".join(f"{r.node[:8]} at {r.address}" for r in self._offering()) or "none does"
            raise BadRequest(
                f"{self.wanted} {problem}: an owner offers it with `swarm-node --drive`; nodes that drive: {offers}"
            )

    async def rounds(self, run: Run, request: Request, scope: PrefixScope) -> AsyncGenerator[Committed, None]:
        """Yield what drivers commit to `run`, up to its end or until no driver is left or wanted.

        Losses and refusals of drivers are noted in `run`, and raised never: the client can go on with the text.
        """
        tried: list[str] = []
        while run.finish_reason is None:
            pick = await self._pick(run, request, tried)
            run.drive_why = pick.why
            if pick.hop is None:
                return
            tried.append(pick.hop.node)
            use = DriverUse(pick.hop.node, without_pin(pick.hop.address), pick.why)
            run.drivers.append(use)
            try:
                async with aclosing(self._driven(use, pick.hop, run, request, scope)) as driven:
                    async for committed in driven:
                        yield committed
                        if committed.finish is not None:
                            return
            except SwarmError as error:
                self._note_loss(use, error, run, request)

    async def _driven(
        self, use: DriverUse, hop: Hop, run: Run, request: Request, scope: PrefixScope
    ) -> AsyncGenerator[Committed, None]:
        text = RemoteText(hop, _drive(hop, run, request, scope, self.view), self.transport, self.view.report_round_trip)
        async with aclosing(text.tokens()) as driven:
            async for message in driven:
                if int(message.tokens.max()) >= self.vocab_size:
                    raise Malformed(f"the driver {hop} sent a token outside the vocabulary of {self.vocab_size}")
                committed = _committed(message, run, request)
                use.add(message, len(committed.tokens))
                if use is run.drivers[0]:
                    run.prefix_tokens = message.prefix_rows
                yield committed

    def _note_loss(self, use: DriverUse, error: SwarmError, run: Run, request: Request) -> None:
        use.ended = str(error)
        if isinstance(error, TransportError | NodeLost | Malformed):
            self.view.report_failure(use.node, error)
        if use.tokens:
            run.lost_driver_at = request.clock()
        log.info("driver %s at %s: %s", use.node[:8], use.address, error)

    # ---------------------------------------------------------------- choice

    async def _pick(self, run: Run, request: Request, tried: Sequence[str]) -> Pick:
        if (reason := self._reason_against(run, request, tried)) is not None:
            return Pick(None, reason)
        if self.wanted != "auto":
            record = self._named()
            if record is None or record.driver is DriverKind.NONE:
                return Pick(None, f"{self.wanted} drives no texts at the moment")
            if record.rules < request.needs.rules:
                return Pick(None, f"{self.wanted} drives no texts under the rules of this request")
            return Pick(self._hop(record), "as named")
        return await self._fastest(request, tried)

    def _reason_against(self, run: Run, request: Request, tried: Sequence[str]) -> str | None:
        """Return why the client drives by itself whatever the distances are, or None."""
        if self.wanted == "self":
            return self.self_why
        if self.wanted != "auto" and tried:
            return f"{self.wanted} drives no longer"
        if len(tried) >= MOST_TRIES:
            return f"{len(tried)} drivers failed"
        limits = request.limits
        for holds, reason in (
            (request.wishes.wanted, "the log-probabilities of other tokens are asked for"),
            (
                len(run.prompt_ids) + limits.max_new_tokens > MAX_DRIVEN_PROMPT,
                f"a driver takes at most {MAX_DRIVEN_PROMPT} tokens",
            ),
            (len(limits.stop_ids) > MAX_STOP_IDS, f"a driver takes at most {MAX_STOP_IDS} stop tokens"),
        ):
            if holds:
                return reason
        return None

    async def _fastest(self, request: Request, tried: Sequence[str]) -> Pick:
        offering = [r for r in self._offering() if r.node not in tried and r.rules >= request.needs.rules]
        if not offering:
            return Pick(None, "no other node drives" if tried else "no node drives")
        near = [r for r in offering if r.position is not None and r.position.error <= LARGEST_ERROR]
        if not near:
            return Pick(None, "the distances of the nodes that drive are not known yet")
        await self._measure(near)
        try:
            rows = min(self.view.rows, 1 if request.tree_size == 0 else ROWS)
            self_s, *driver_s = self.view.traversals_s([None, *(record.node for record in near)], rows)
            offers = [DriverOffer(self._hop(r), r.driver, s) for r, s in zip(near, driver_s, strict=True)]
        except MissingBlocks:
            return Pick(None, "blocks are missing")
        tail_proposes = self.view.tail_speculator() is not None
        best = choose_driver(self_s, offers, DraftsHere(self.own_draft, request.tree_size == 0, tail_proposes))
        fastest_s = min(offer.traversal_s for offer in offers) if best is None else best.traversal_s
        why = f"a traversal from there takes about {1e3 * fastest_s:.0f} ms, from here {1e3 * self_s:.0f} ms"
        return Pick(best.hop if best is not None else None, why)

    async def _measure(self, offering: Sequence[NodeRecord]) -> None:
        """Measure the distances to nodes that were not measured yet: those that drive, then those of the route."""
        route = self.view.fastest_hops()
        ends = {hop.node for hop in (*route[:1], *route[-1:])}
        records = [*offering, *(r for r in self.view.serving() if r.node in ends)]
        due = {r.node: self._hop(r).address for r in records if r.node not in self.view.distances.round_trips}

        async def measure(node: str, address: str) -> None:
            try:
                self.view.report_round_trip(node, await round_trip(self.transport, address, PINGS, MEASURE_S))
            except (SwarmError, TimeoutError) as error:
                log.info("the distance to %s could not be measured: %s", address, error)

        await asyncio.gather(*(measure(*item) for item in list(due.items())[:MOST_MEASURED]))

    def _offering(self) -> list[NodeRecord]:
        """Return the records of the nodes that drive and have not failed lately, nearest first as far as is known."""
        banned = self.view.failures.banned(asyncio.get_running_loop().time())
        offering = [r for r in self.view.serving() if r.driver is not DriverKind.NONE and r.node not in banned]
        trips = self.view.distances.round_trips
        return sorted(offering, key=lambda r: trips[r.node].smoothed if r.node in trips else 0.0)[:MOST_MEASURED]

    def _named(self) -> NodeRecord | None:
        """Return the record of the node that was named by its address, its id, or the beginning of its id."""
        named = without_pin(self.wanted)
        for record in self.view.serving():
            addresses = {record.address, without_pin(self.view.dials.get(record.node, ""))}
            if named in addresses or (len(named) >= 8 and record.node.startswith(named)):
                return record
        return None

    def _hop(self, record: NodeRecord) -> Hop:
        return Hop(record.node, self.view.dials.get(record.node) or record.dial, record.span)


def _drive(hop: Hop, run: Run, request: Request, scope: PrefixScope, view: SwarmView) -> Drive:
    """Return the request to go on with a run: its text so far is the prompt, and noise depends on positions alone."""
    return Drive(
        version=PROTOCOL_VERSION,
        text=secrets.token_bytes(SESSION_ID_BYTES),
        numerics=view.target.numerics,
        prompt=np.array([*run.prompt_ids, *run.token_ids], np.uint32),
        settings=request.settings,
        max_new_tokens=request.limits.max_new_tokens - len(run.token_ids),
        stop_ids=np.array(sorted(request.limits.stop_ids), np.uint32),
        tree_size=None if request.tree_size == "auto" else request.tree_size,
        prefix_secret=_secret_for(hop.node, request.prefix_secret, scope),
        rules=request.rules,
    )


def _secret_for(node: str, secret: bytes, scope: PrefixScope) -> bytes:
    """Return the secret by which a driver shares the beginnings of texts: one that is of no use to other nodes."""
    if scope == "none":
        return b""
    return SWARM_SCOPE if scope == "swarm" else blake2b(node.encode(), key=secret, digest_size=SCOPE_BYTES).digest()


def _committed(message: DrivenTokens, run: Run, request: Request) -> Committed:
    """Return what a message commits, and keep its figures; where the text ends is for the client to say."""
    limits, recorder, costs = request.limits, run.recorder, message.traversal
    tokens = [int(token) for token in message.tokens]
    stop = next((i + 1 for i, token in enumerate(tokens) if token in limits.stop_ids), None)
    kept = stop or len(tokens)
    recorder.add_driven(costs, kept)
    if costs.repairs:
        now = request.clock()
        recorder.recoveries += [(now - costs.seconds_us / 1e6, now)] * costs.repairs
    finish: FinishReason | None = "length" if recorder.committed >= limits.max_new_tokens else None
    if stop is not None:
        finish = "stop"
    logprobs = tuple(float(logprob) for logprob in message.logprobs[:kept])
    return Committed(tuple(tokens[:kept]), logprobs, recorder.traversals, finish)
