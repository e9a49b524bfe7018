"""The viewers of the map, and the events that they receive: the swarm at intervals, every tree as it comes back."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from treeswarm.errors import SwarmError
from treeswarm_client.gateway.answers.token_text import Decode, token_text
from treeswarm_client.gateway.errors import Busy
from treeswarm_client.generation.loop import FinishReason
from treeswarm_client.generation.run import Token
from treeswarm_client.planner.policy import Round

# Seconds between two looks at the swarm: faster changes cannot be seen.
POLL_S = 1.0
# Seconds without an event after which a keepalive is sent.  Proxies close a connection that is silent for a minute,
# and the page notices within two of these intervals that the gateway is gone.
KEEPALIVE_S = 15.0
# Number of events that wait for a viewer who reads slowly; from then on rounds are left out.
MAX_QUEUED_ROUNDS = 256
# Number of waiting events of any kind after which a viewer is disconnected.
MAX_QUEUED_EVENTS = 4 * MAX_QUEUED_ROUNDS
# Number of draft nodes that a picture can show.
MAX_DRAWN_NODES = 192

MapEvent = dict[str, Any]
ReadOverview = Callable[[], Awaitable[MapEvent]]
"""A function that returns the swarm as the map shows it."""


@dataclass(eq=False)
class Watchers:
    """The viewers of the map.  No overview is read, and no tree prepared, while there are none."""

    max_viewers: int
    _queues: set[asyncio.Queue[MapEvent | None]] = field(default_factory=set)
    """One queue of events per viewer."""
    _overview: MapEvent | None = None
    """The latest look at the swarm."""
    _generations: dict[int, MapEvent] = field(default_factory=dict)
    """The first event of each generation under way, for viewers who come later."""
    _ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def __bool__(self) -> bool:
        """Return whether there are viewers."""
        return bool(self._queues)

    def listen(self) -> AsyncGenerator[MapEvent | None, None]:
        """Yield events, each with a `kind`: `overview` or `waiting`, `begin`, `first`, `round`, `end`.

        None stands for an interval without events.  Raises Busy at once if there are too many viewers.
        """
        if len(self._queues) >= self.max_viewers:
            raise Busy(f"the map has {len(self._queues)} viewers already: close some")
        return self._listen()

    async def _listen(self) -> AsyncGenerator[MapEvent | None, None]:
        queue: asyncio.Queue[MapEvent | None] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._queues.add(queue)
        self._arrived.set()
        try:
            if self._overview is not None:
                yield self._overview
            for beginning in list(self._generations.values()):
                yield beginning
            while True:
                try:
                    event = await asyncio.wait_for(queue.get(), KEEPALIVE_S)
                except TimeoutError:
                    yield None
                    continue
                if event is None:
                    return
                yield event
        finally:
            self._queues.discard(queue)

    def close(self) -> None:
        """Disconnect all viewers."""
        for queue in self._queues:
            _disconnect(queue)

    def send(self, event: MapEvent) -> None:
        """Send an event to all viewers.

        A viewer who reads slowly misses rounds, but no beginning and no end.  One who does not read is disconnected.
        """
        for queue in self._queues:
            if queue.full():
                _disconnect(queue)
            elif event["kind"] != "round" or queue.qsize() < MAX_QUEUED_ROUNDS:
                queue.put_nowait(event)

    def add_generation(self, decode: Decode | None) -> "WatchedGeneration":
        """Return a new generation to show; without `decode`, only the shapes of its trees are shown."""
        return WatchedGeneration(self, next(self._ids), decode)

    def send_begin(self, event: MapEvent) -> None:
        """Send the first event of a generation, and keep it for viewers who come later."""
        self._generations[event["id"]] = event
        self.send(event)

    def send_end(self, event: MapEvent) -> None:
        """Send the last event of a generation that has begun."""
        if self._generations.pop(event["id"], None) is not None:
            self.send(event)

    async def poll_swarm(self, read_overview: ReadOverview) -> None:
        """Look at the swarm while there are viewers, until cancelled."""
        while True:
            if not self:
                self._arrived.clear()
                await self._arrived.wait()
            try:
                overview = await read_overview()
            except SwarmError as error:  # a lost registry comes back
                overview = {"kind": "waiting", "why": str(error)}
            if overview != self._overview:
                self._overview = overview
                self.send(overview)
            await asyncio.sleep(POLL_S)


@dataclass(eq=False)
class WatchedGeneration:
    """One generation as viewers follow it."""

    watchers: Watchers
    id: int
    decode: Decode | None
    rounds: int = 0
    """Number of rounds so far."""
    _began_at: float = 0.0
    _has_token: bool = False

    def begin(self, prompt_tokens: int) -> None:
        """Show that the prompt is sent."""
        self._began_at = time.perf_counter()
        self.watchers.send_begin({"kind": "begin", "id": self.id, "prompt": prompt_tokens})

    def add_token(self, token: Token) -> None:
        """Show the first token, which comes without a tree as the answer to the prompt; ignore the others."""
        if self._has_token:
            return
        self._has_token = True
        seconds = time.perf_counter() - self._began_at
        self.watchers.send({"kind": "first", "id": self.id, **first_token_as_dict(token.id, seconds, self.decode)})

    def add_round(self, round_: Round) -> None:
        """Show the tree of a round and the walk through it."""
        self.rounds += 1
        if self.watchers:
            event = {"kind": "round", "id": self.id, "round": self.rounds}
            self.watchers.send({**event, **round_as_dict(round_, self.decode)})

    def end(self, finish: FinishReason | None) -> None:
        """Show that the generation has ended; None means that it failed or that its caller left."""
        self.watchers.send_end({"kind": "end", "id": self.id, "finish": finish})


def _disconnect(queue: "asyncio.Queue[MapEvent | None]") -> None:
    while not queue.empty():
        queue.get_nowait()
    queue.put_nowait(None)


def first_token_as_dict(token: int, seconds: float, decode: Decode | None) -> dict[str, Any]:
    """Return the first token and the time it took."""
    event: dict[str, Any] = {"ms": round(seconds * 1e3, 1)}
    return event if decode is None else {**event, "bonus": token_text(token, decode)}


def round_as_dict(round_: Round, decode: Decode | None) -> dict[str, Any]:
    """Return a round's tree and the target's path through it.

    `parents` are node numbers, -1 for the root.  Where the tree is larger than a picture, the accepted nodes are kept.
    """
    accepted = set(round_.walk.accepted)
    kept = [i for i in range(len(round_.draft)) if i < MAX_DRAWN_NODES or i in accepted]
    number = {node: i for i, node in enumerate(kept)} | {-1: -1}
    event: dict[str, Any] = {
        "nodes": len(round_.draft),
        "first": round_.first_shipped,
        "parents": [number[int(round_.draft.parents[i])] for i in kept],
        "accepted": [number[i] for i in round_.walk.accepted],
        "ms": round(round_.seconds * 1e3, 1),
    }
    if decode is not None:
        event["words"] = [token_text(int(round_.draft.tokens[i]), decode) for i in kept]
        event["bonus"] = token_text(round_.walk.bonus, decode)
    return event
