"""The transport interface: dial an address and get an ordered stream of messages.

There are two implementations: `memory.py` (a seeded unreliable network for tests) and `grpc.py`.  `emulated.py` wraps
either of them in links of a given delay and rate.  One conformance suite runs against all of them.
"""

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from treeswarm.protocol.messages import Message


class StreamKind(StrEnum):
    """Purpose of a stream; see `treeswarm.protocol.messages`."""

    CONTROL = "control"
    LINK = "link"


@dataclass(eq=False)
class Traffic:
    """Bytes of messages since the transport was created, by kind of stream, without the overhead of TLS and HTTP/2."""

    sent: Counter[StreamKind] = field(default_factory=Counter)
    received: Counter[StreamKind] = field(default_factory=Counter)


class Stream(Protocol):
    """A bidirectional stream.  One task may send while another receives."""

    @property
    def peer(self) -> str:
        """Address of the other end, for logs and error messages."""
        ...

    async def send(self, message: Message) -> None:
        """Send one message; wait while the stream's buffer is full.

        Raises LinkBroken, or the error that the peer ended the stream with (Refused, Malformed) where it is known.
        """
        ...

    async def receive(self) -> Message | None:
        """Return the next message, or None when the peer has ended the stream.

        Raises LinkBroken if the stream broke, and Refused if the peer ended it with an error.  Raises Malformed if the
        received bytes are not a message: the stream is then unusable, and the peer has been informed.
        """
        ...

    async def end(self, error: Exception | None = None) -> None:
        """End the stream; messages sent before still arrive.

        With an error (accepting side only), the peer's `receive` raises Refused with the error's text.  Calling this
        twice is allowed, and it never raises.
        """
        ...


Accept = Callable[[StreamKind, Stream], Awaitable[None]]
"""Callback for each stream that a peer opens.

The stream is ended when the callback returns.  If the callback raises, the stream is ended with that error.
"""


class Listener(Protocol):
    """An open port."""

    @property
    def address(self) -> str:
        """Bound address as `host:port`.  If port 0 was requested, this is the port that the system chose."""
        ...

    async def close(self) -> None:
        """Stop accepting, and break the accepted streams."""
        ...


class Transport(Protocol):
    """Dials and listens."""

    async def connect(self, address: str, kind: StreamKind) -> Stream:
        """Open a stream to `address`, which is `host:port` or `host:port#pin`.

        Raises Unreachable when nothing answers there, and Impostor when a machine with another key than the pin
        answers.  Raises Refused when only one of the two ends belongs to a private swarm, or both to different ones.
        Raises BadRequest when `address` is malformed.
        """
        ...

    async def listen(self, address: str, accept: Accept) -> Listener:
        """Bind `address`, and call `accept` for each stream.

        Raises BadRequest with the next step when the port is in use or the address is not this machine's.
        """
        ...

    async def close(self) -> None:
        """Close every connection that this transport dialled.

        Pending `receive` calls raise LinkBroken.  From then on, `connect` raises Unreachable.
        """
        ...
