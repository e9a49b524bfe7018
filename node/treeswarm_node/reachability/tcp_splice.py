"""Two TCP connections made into one: what arrives at either leaves at the other, no faster than that takes it.

Protocols rather than streams: no task has to be woken for a piece, and one buffer serves all reads.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from treeswarm.transport.rate_limit import RateLimiter

# One read's worth.  With 64 KiB an echo of 1 MiB through a lent port took 0.8 ms longer (docs/benchmarks.md).
READ_BYTES = 1 << 18
# What may wait in front of a receiver before its sender is held back.  With one read more, that is all the memory of
# one direction.
WAITING_BYTES = 1 << 16
# For the sake of what this program sends besides, a connection is held no longer: gRPC gives up one whose ping is not
# answered within five seconds (transport/grpc.py), and pings pass two of these.
MOST_HOLD_S = 1.0
# Pings and heartbeats are smaller, trees are larger.
SMALL_BYTES = 1 << 11
# gRPC pings every connection each 10 s (transport/grpc.py): one on which nothing comes for so long has lost an end.
IDLE_S = 60.0


def new_buffer() -> memoryview:
    """For any number of ends on one event loop: what is read is passed on before the next read."""
    return memoryview(bytearray(READ_BYTES))


@dataclass(eq=False)
class ByteCounter:
    """The rate of all that shares it, in bytes a second; 0 for no limit."""

    rate: int = 0
    pace: RateLimiter | None = None
    """Of all that this program sends."""
    _free_at: float = 0.0

    def wait_s(self, size: int, now: float) -> float:
        """How long whoever has just passed on `size` bytes must read nothing."""
        shared_s = 0.0
        if self.pace is not None:
            self.pace.charge(size, now)
            shared_s = min(self.pace.owed_s(now), MOST_HOLD_S) if size > SMALL_BYTES else 0.0
        if not self.rate:
            return shared_s
        self._free_at = max(self._free_at, now) + size / self.rate
        return max(shared_s, self._free_at - now)


class Hold(Enum):
    """Why nothing is read from an end."""

    ALONE = "alone"
    """Nobody knows yet where it is to go."""
    FULL = "full"
    """The other end does not take it."""
    METERED = "metered"


class End(asyncio.BufferedProtocol):
    """One of the two connections.  Nothing is read from it before `splice`, but a greeting of known length."""

    transport: asyncio.Transport

    def __init__(
        self,
        buffer: memoryview,
        *,
        made: Callable[["End"], None] | None = None,
        lost: Callable[["End"], None] | None = None,
        greeting: int = 0,
        greeted: Callable[["End", bytes], None] | None = None,
    ) -> None:
        """`greeted` is called with the first `greeting` bytes."""
        self._buffer = buffer
        self._made, self._lost, self._greeted = made, lost, greeted
        self._greeting, self._said = memoryview(bytearray(greeting)), 0
        self._holds = {Hold.ALONE}
        self._splice: _Splice | None = None
        self.at_end = False
        """It sends nothing more."""
        self.gone = False

    @property
    def host(self) -> str:
        """Of whoever is at the other side."""
        return _endpoint(self.transport.get_extra_info("peername"))[0]

    @property
    def own_port(self) -> int:
        return _endpoint(self.transport.get_extra_info("sockname"))[1]

    @property
    def held_by_rate(self) -> bool:
        return Hold.METERED in self._holds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=WAITING_BYTES)
        if not self._greeting:
            transport.pause_reading()
        if self._made is not None:
            self._made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._greeting[self._said :] if self._said < len(self._greeting) else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._said < len(self._greeting):
            self._said += nbytes
            if self._said == len(self._greeting):
                self.transport.pause_reading()
                if self._greeted is not None:
                    self._greeted(self, bytes(self._greeting))
        elif self._splice is not None:
            # A copy, because from Python 3.12 on the transport may keep what it was given until it is sent.
            self._splice.pass_on(self, bytes(self._buffer[:nbytes]))
        else:
            self.transport.abort()  # a proactor's read may hold more than was asked for; no tenant of ours says more

    def eof_received(self) -> bool:
        self.at_end = True
        return self._splice is not None and self._splice.half_close(self)

    def pause_writing(self) -> None:
        if self._splice is not None:
            self._splice.other(self).hold(Hold.FULL)

    def resume_writing(self) -> None:
        if self._splice is not None:
            self._splice.other(self).release(Hold.FULL)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        if self._splice is not None:
            self._splice.lost(self, exc)
        if self._lost is not None:
            self._lost(self)

    def join(self, made: "_Splice") -> None:
        self._splice = made
        self.release(Hold.ALONE)

    def hold(self, why: Hold) -> None:
        self._holds.add(why)
        if not self.gone:
            self.transport.pause_reading()

    def release(self, why: Hold) -> None:
        self._holds.discard(why)
        # After its end there is nothing to read, and asyncio would tell of that end again.
        if not self._holds and not self.at_end and not self.gone:
            self.transport.resume_reading()


class _Splice:
    """Two ends joined."""

    def __init__(self, one: End, two: End, meter: ByteCounter, idle_s: float) -> None:
        self._one, self._two, self._meter, self._idle_s = one, two, meter, idle_s
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(idle_s, self._look)

    def other(self, end: End) -> End:
        return self._two if end is self._one else self._one

    def pass_on(self, source: End, data: bytes) -> None:
        target = self.other(source)
        if target.gone:
            return
        self._heard_at = self._loop.time()
        target.transport.write(data)
        wait_s = self._meter.wait_s(len(data), self._heard_at)
        if wait_s > 0.0:
            source.hold(Hold.METERED)
            self._loop.call_later(wait_s, source.release, Hold.METERED)

    def half_close(self, source: End) -> bool:
        """Pass on that nothing more comes; whether `source` stays open for what is still to come back."""
        target = self.other(source)
        if target.at_end or target.gone:
            target.transport.close()
            return False
        target.transport.write_eof()
        return True

    def lost(self, end: End, error: Exception | None) -> None:
        """What was passed on before an orderly end still arrives, if it is taken in time."""
        other = self.other(end)
        if other.gone:
            self._timer.cancel()
        elif error is None:
            other.transport.close()
        else:
            other.transport.abort()

    def _look(self) -> None:
        now = self._loop.time()
        if self._one.held_by_rate or self._two.held_by_rate:
            self._heard_at = now
        left_s = self._heard_at + self._idle_s - now
        if left_s > 0.0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        self._one.transport.abort()
        self._two.transport.abort()


def splice(one: End, two: End, meter: ByteCounter | None = None, idle_s: float = IDLE_S) -> None:
    """From now on either ends with the other."""
    made = _Splice(one, two, meter or ByteCounter(), idle_s)
    for end in (one, two):
        if end.gone:
            made.other(end).transport.abort()
    one.join(made)
    two.join(made)


def _endpoint(name: object) -> tuple[str, int]:
    """Nobody's, for a connection that was gone before it could be asked."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else ("", 0)
