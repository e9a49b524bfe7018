"""The transport seam: dial an address, get an ordered stream of messages.

Adapters: `memory.py` (a seeded terrible network for tests) and `grpc.py`.  `emulated.py` wraps either
in links of a given delay and rate.  One conformance suite runs against all of them.
"""

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from treeswarm.protocol.messages import Message


class StreamKind(StrEnum):
    """What a stream is for; see `treeswarm.protocol.messages`."""

    CONTROL = "control"
    LINK = "link"


@dataclass(eq=False)
class Traffic:
    """Bytes of messages since start, by the kind of stream; without what TLS and HTTP/2 add."""

    sent: Counter[StreamKind] = field(default_factory=Counter)
    received: Counter[StreamKind] = field(default_factory=Counter)


class Stream(Protocol):
    """A bidirectional stream.  One task may send while another receives."""

    @property
    def peer(self) -> str:
        """The other end's address, for people."""
        ...

    async def send(self, message: Message) -> None:
        """Hand over one message; waits while the stream is full.

        Raises LinkBroken, or what the peer ended the stream with (Refused, Malformed) where that is known.
        """
        ...

    async def receive(self) -> Message | None:
        """The next message, or None when the peer has ended the stream.

        Raises LinkBroken if it broke, Refused if the peer ended it with an error, Malformed if what came is
        no message (the stream is then of no further use; the adapter has told the peer).
        """
        ...

    async def end(self, error: Exception | None = None) -> None:
        """End the stream: what was sent before still arrives.  With an error (accepting side), the peer's
        `receive` raises it as Refused with that text.  Idempotent, never raises."""
        ...


Accept = Callable[[StreamKind, Stream], Awaitable[None]]
"""Called for every stream a peer opens; the stream is ended when it returns, with its error if it raises."""


class Listener(Protocol):
    """An open port."""

    @property
    def address(self) -> str:
        """`host:port` as bound; a port asked for as 0 is the real one here."""
        ...

    async def close(self) -> None:
        """Stop accepting and break the streams accepted."""
        ...


class Transport(Protocol):
    """Dials and listens."""

    async def connect(self, address: str, kind: StreamKind) -> Stream:
        """Open a stream.  Raises Unreachable when nobody answers, Impostor when somebody else than the address's pin
        says does, Refused when one of the two is not of the other's private swarm, BadRequest when it is no address."""
        ...

    async def listen(self, address: str, accept: Accept) -> Listener:
        """Bind and accept.  Raises BadRequest with the next step when the port is in use or not ours to bind."""
        ...

    async def close(self) -> None:
        """Drop every connection this transport dialled: whoever waits for a message hears LinkBroken.  From then on
        `connect` raises Unreachable."""
        ...
