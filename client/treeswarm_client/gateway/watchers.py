"""Who looks at the map, and what they are told: the swarm now and then, every tree as it comes back."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm_client.gateway.errors import Busy
from treeswarm_client.pace import Round

# Eyes are no faster, and a look asks every node that has not been asked for ten seconds.
LOOK_S = 1.0
# A viewer who reads slower misses what came meanwhile.
AHEAD = 256
# More nodes than a picture can show.
MOST_DRAWN = 192

Decode = Callable[[Sequence[int]], str]
Look = Callable[[], Awaitable[dict[str, Any] | None]]


@dataclass(eq=False)
class Watchers:
    """Nothing is prepared for them while nobody watches."""

    most: int
    _heard: set[asyncio.Queue[dict[str, Any] | None]] = field(default_factory=set)
    _overview: dict[str, Any] | None = None
    _ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def __bool__(self) -> bool:
        return bool(self._heard)

    async def listen(self) -> AsyncGenerator[dict[str, Any], None]:
        """Events, each with a `kind`: `overview`, `round`, `end`.  Raises Busy where too many watch."""
        if len(self._heard) >= self.most:
            raise Busy(f"{len(self._heard)} viewers watch already: close some")
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(AHEAD)
        self._heard.add(queue)
        self._arrived.set()
        try:
            if self._overview is not None:
                yield {"kind": "overview", **self._overview}
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._heard.discard(queue)

    def close(self) -> None:
        """Nothing more comes: let them go."""
        for queue in self._heard:
            while queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    def tell(self, event: dict[str, Any]) -> None:
        for queue in self._heard:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(event)

    def generation(self, decode: Decode | None) -> "Shown":
        """A generation to show; without `decode`, its shapes only."""
        return Shown(self, next(self._ids), decode)

    async def keep_looking(self, look: Look) -> None:
        """Look at the swarm while anybody watches; until cancelled."""
        while True:
            if not self:
                self._arrived.clear()
                await self._arrived.wait()
            seen = await look()
            if seen is not None and seen != self._overview:
                self._overview = seen
                self.tell({"kind": "overview", **seen})
            await asyncio.sleep(LOOK_S)


@dataclass(eq=False)
class Shown:
    """One generation, as viewers follow it."""

    watchers: Watchers
    id: int
    decode: Decode | None
    rounds: int = 0

    def round(self, flown: Round) -> None:
        """A tree came back."""
        self.rounds += 1
        if self.watchers:
            self.watchers.tell({"kind": "round", "id": self.id, "round": self.rounds, **drawn(flown, self.decode)})

    def end(self) -> None:
        self.watchers.tell({"kind": "end", "id": self.id})


def drawn(flown: Round, decode: Decode | None) -> dict[str, Any]:
    """A tree and the way the target took through it.  `parents` are node numbers, -1 the root; the accepted nodes are
    kept also where the tree is larger than a picture."""
    accepted = set(flown.found.accepted)
    kept = [i for i in range(len(flown.draft)) if i < MOST_DRAWN or i in accepted]
    number = {node: i for i, node in enumerate(kept)} | {-1: -1}
    made: dict[str, Any] = {
        "nodes": len(flown.draft),
        "first": flown.first,
        "parents": [number[int(flown.draft.parents[i])] for i in kept],
        "accepted": [number[i] for i in flown.found.accepted],
        "ms": round(flown.seconds * 1e3, 1),
    }
    if decode is not None:
        made["words"] = [decode([int(flown.draft.tokens[i])]) for i in kept]
        made["bonus"] = decode([flown.found.bonus])
    return made
