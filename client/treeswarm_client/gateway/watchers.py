"""Who looks at the map, and what they are told: the swarm now and then, every tree as it comes back."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from treeswarm.errors import SwarmError
from treeswarm_client.gateway.answers import Decode, token_text
from treeswarm_client.gateway.errors import Busy
from treeswarm_client.generation.loop import FinishReason
from treeswarm_client.generation.run import Token
from treeswarm_client.planner.policy import Round

# Eyes are no faster.
POLL_S = 1.0
# Proxies close what says nothing for a minute, and a page notices within two of these that nobody is there.
KEEPALIVE_S = 15.0
# Trees that wait for a viewer who reads slowly, and events of any kind.
AHEAD = 256
MAX_QUEUED_EVENTS = 4 * AHEAD
# More nodes than a picture can show.
MAX_DRAWN_NODES = 192

ReadOverview = Callable[[], Awaitable[dict[str, Any]]]


@dataclass(eq=False)
class Watchers:
    """Nothing is prepared for them while nobody watches."""

    most: int
    _heard: set[asyncio.Queue[dict[str, Any] | None]] = field(default_factory=set)
    _seen: dict[str, Any] | None = None
    """The latest look."""
    _under_way: dict[int, dict[str, Any]] = field(default_factory=dict)
    """How each generation began, for who comes later."""
    _ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def __bool__(self) -> bool:
        return bool(self._heard)

    def listen(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        """Events, each with a `kind`: `overview` or `waiting`, `begin`, `first`, `round`, `end`; None where there was
        none for a while.  Raises Busy at once where too many watch."""
        if len(self._heard) >= self.most:
            raise Busy(f"{len(self._heard)} viewers watch already: close some")
        return self._listen()

    async def _listen(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._heard.add(queue)
        self._arrived.set()
        try:
            if self._seen is not None:
                yield self._seen
            for begun in list(self._under_way.values()):
                yield begun
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
            self._heard.discard(queue)

    def close(self) -> None:
        """Nothing more comes: let them go."""
        for queue in self._heard:
            _let_go(queue)

    def tell(self, event: dict[str, Any]) -> None:
        """Who reads slowly misses trees, never beginnings and ends; who does not read at all must come again."""
        for queue in self._heard:
            if queue.full():
                _let_go(queue)
            elif event["kind"] != "round" or queue.qsize() < AHEAD:
                queue.put_nowait(event)

    def generation(self, decode: Decode | None) -> "WatchedGeneration":
        """A generation to show; without `decode`, its shapes only."""
        return WatchedGeneration(self, next(self._ids), decode)

    def began(self, event: dict[str, Any]) -> None:
        self._under_way[event["id"]] = event
        self.tell(event)

    def ended(self, event: dict[str, Any]) -> None:
        if self._under_way.pop(event["id"], None) is not None:
            self.tell(event)

    async def poll_swarm(self, look: ReadOverview) -> None:
        """Look at the swarm while anybody watches; until cancelled."""
        while True:
            if not self:
                self._arrived.clear()
                await self._arrived.wait()
            try:
                seen = await look()
            except SwarmError as error:  # a registry that is lost comes back
                seen = {"kind": "waiting", "why": str(error)}
            if seen != self._seen:
                self._seen = seen
                self.tell(seen)
            await asyncio.sleep(POLL_S)


@dataclass(eq=False)
class WatchedGeneration:
    """One generation, as viewers follow it."""

    watchers: Watchers
    id: int
    decode: Decode | None
    rounds: int = 0
    _began_at: float = 0.0
    _spoke: bool = False

    def begin(self, prompt_tokens: int) -> None:
        """Its prompt sets off."""
        self._began_at = time.perf_counter()
        self.watchers.began({"kind": "begin", "id": self.id, "prompt": prompt_tokens})

    def said(self, token: Token) -> None:
        """A token came; the first of all came without a tree, with the prompt's own answer."""
        if self._spoke:
            return
        self._spoke = True
        seconds = time.perf_counter() - self._began_at
        self.watchers.tell({"kind": "first", "id": self.id, **first_token_as_dict(token.id, seconds, self.decode)})

    def round(self, flown: Round) -> None:
        """A tree came back."""
        self.rounds += 1
        if self.watchers:
            self.watchers.tell(
                {"kind": "round", "id": self.id, "round": self.rounds, **round_as_dict(flown, self.decode)}
            )

    def end(self, finish: FinishReason | None) -> None:
        """It is over; None: it broke, or its caller left."""
        self.watchers.ended({"kind": "end", "id": self.id, "finish": finish})


def _let_go(queue: "asyncio.Queue[dict[str, Any] | None]") -> None:
    while not queue.empty():
        queue.get_nowait()
    queue.put_nowait(None)


def first_token_as_dict(token: int, seconds: float, decode: Decode | None) -> dict[str, Any]:
    """The first token, and how long it took."""
    made: dict[str, Any] = {"ms": round(seconds * 1e3, 1)}
    return made if decode is None else {**made, "bonus": token_text(token, decode)}


def round_as_dict(flown: Round, decode: Decode | None) -> dict[str, Any]:
    """A tree and the way the target took through it.  `parents` are node numbers, -1 the root; the accepted nodes are
    kept also where the tree is larger than a picture."""
    accepted = set(flown.found.accepted)
    kept = [i for i in range(len(flown.draft)) if i < MAX_DRAWN_NODES or i in accepted]
    number = {node: i for i, node in enumerate(kept)} | {-1: -1}
    made: dict[str, Any] = {
        "nodes": len(flown.draft),
        "first": flown.first,
        "parents": [number[int(flown.draft.parents[i])] for i in kept],
        "accepted": [number[i] for i in flown.found.accepted],
        "ms": round(flown.seconds * 1e3, 1),
    }
    if decode is not None:
        made["words"] = [token_text(int(flown.draft.tokens[i]), decode) for i in kept]
        made["bonus"] = token_text(flown.found.bonus, decode)
    return made
