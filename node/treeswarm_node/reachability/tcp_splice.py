"""Join two TCP connections into one: what arrives on either leaves on the other, as fast as that one takes it.

This uses asyncio's protocols rather than its streams: no task has to be woken for a piece, and one buffer serves all
reads.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from treeswarm.transport.rate_limit import RateLimiter

# Bytes of one read.  With 64 KiB an echo of 1 MiB through a lent port took 0.8 ms longer (docs/benchmarks.md).
READ_BYTES = 1 << 18
# Bytes that may wait for a receiver before its sender is held back.  With one read more, that is all the memory of one
# direction.
WAITING_BYTES = 1 << 16
# A connection is not held longer than this for the sake of what this program sends besides.  gRPC gives up a connection
# whose ping is not answered within five seconds (transport/grpc.py), and pings pass two of these holds.
MAX_HOLD_S = 1.0
# Pings and heartbeats are smaller than this, trees are larger.
SMALL_BYTES = 1 << 11
# gRPC pings every connection each 10 s (transport/grpc.py): one that is silent for this long has lost an end.
IDLE_S = 60.0


def new_buffer() -> memoryview:
    """Return a read buffer for any number of ends on one event loop: each read is passed on before the next one."""
    return memoryview(bytearray(READ_BYTES))


@dataclass(eq=False)
class ByteCounter:
    """Counts the bytes of all connections that share a rate, and says how long to hold them back."""

    bytes_per_s: int = 0
    """Most bytes per second; 0 for no limit."""
    rate_limiter: RateLimiter | None = None
    """Rate of everything that this program sends, or None if that is not limited."""
    _free_at: float = 0.0

    def count(self, size: int, now: float) -> float:
        """Count `size` bytes passed on at the time `now`; return the seconds for which to read no more from there."""
        shared_s = 0.0
        if self.rate_limiter is not None:
            self.rate_limiter.charge(size, now)
            shared_s = min(self.rate_limiter.owed_s(now), MAX_HOLD_S) if size > SMALL_BYTES else 0.0
        if not self.bytes_per_s:
            return shared_s
        self._free_at = max(self._free_at, now) + size / self.bytes_per_s
        return max(shared_s, self._free_at - now)


class Hold(Enum):
    """A reason for which nothing is read from an end."""

    UNJOINED = "unjoined"
    """The end is not joined to another yet."""
    FULL = "full"
    """The other end does not take more."""
    RATE = "rate"
    """The rate does not allow more now."""


class SpliceEnd(asyncio.BufferedProtocol):
    """One of two connections to join.  Before `splice`, nothing but a greeting of known length is read from it."""

    transport: asyncio.Transport

    def __init__(
        self,
        buffer: memoryview,
        *,
        on_connected: Callable[["SpliceEnd"], None] | None = None,
        on_lost: Callable[["SpliceEnd"], None] | None = None,
        greeting_bytes: int = 0,
        on_greeting: Callable[["SpliceEnd", bytes], None] | None = None,
    ) -> None:
        """`on_greeting` is called with the first `greeting_bytes` that arrive."""
        self._buffer = buffer
        self._on_connected, self._on_lost, self._on_greeting = on_connected, on_lost, on_greeting
        self._greeting, self._greeting_read = memoryview(bytearray(greeting_bytes)), 0
        self._holds = {Hold.UNJOINED}
        self._splice: _Splice | None = None
        self.at_eof = False
        """Whether the remote machine sends nothing more."""
        self.lost = False
        """Whether the connection is closed."""

    @property
    def host(self) -> str:
        """Host of the remote machine."""
        return _endpoint(self.transport.get_extra_info("peername"))[0]

    @property
    def own_port(self) -> int:
        """Local port of the connection."""
        return _endpoint(self.transport.get_extra_info("sockname"))[1]

    @property
    def held_by_rate(self) -> bool:
        return Hold.RATE in self._holds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=WAITING_BYTES)
        if not self._greeting:
            transport.pause_reading()
        if self._on_connected is not None:
            self._on_connected(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._greeting[self._greeting_read :] if self._greeting_read < len(self._greeting) else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._greeting_read < len(self._greeting):
            self._greeting_read += nbytes
            if self._greeting_read == len(self._greeting):
                self.transport.pause_reading()
                if self._on_greeting is not None:
                    self._on_greeting(self, bytes(self._greeting))
        elif self._splice is not None:
            # A copy, because from Python 3.12 on the transport may keep what it was given until it is sent.
            self._splice.pass_on(self, bytes(self._buffer[:nbytes]))
        else:
            # A proactor's read may hold more than the greeting that was asked for; no borrower of ours sends more.
            self.transport.abort()

    def eof_received(self) -> bool:
        self.at_eof = True
        return self._splice is not None and self._splice.half_close(self)

    def pause_writing(self) -> None:
        if self._splice is not None:
            self._splice.other(self).hold(Hold.FULL)

    def resume_writing(self) -> None:
        if self._splice is not None:
            self._splice.other(self).release(Hold.FULL)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._splice is not None:
            self._splice.end_lost(self, exc)
        if self._on_lost is not None:
            self._on_lost(self)

    def join(self, joined: "_Splice") -> None:
        """Start to read for a splice."""
        self._splice = joined
        self.release(Hold.UNJOINED)

    def hold(self, reason: Hold) -> None:
        """Read nothing until the reason is released."""
        self._holds.add(reason)
        if not self.lost:
            self.transport.pause_reading()

    def release(self, reason: Hold) -> None:
        """Read again if no other reason holds the end."""
        self._holds.discard(reason)
        # After the end of the data there is nothing to read, and asyncio would report that end again.
        if not self._holds and not self.at_eof and not self.lost:
            self.transport.resume_reading()


class _Splice:
    """Two joined ends."""

    def __init__(self, first: SpliceEnd, second: SpliceEnd, counter: ByteCounter, idle_s: float) -> None:
        self._first, self._second, self._counter, self._idle_s = first, second, counter, idle_s
        self._loop = asyncio.get_running_loop()
        self._read_at = self._loop.time()
        self._timer = self._loop.call_later(idle_s, self._check_idle)

    def other(self, end: SpliceEnd) -> SpliceEnd:
        return self._second if end is self._first else self._first

    def pass_on(self, source: SpliceEnd, data: bytes) -> None:
        target = self.other(source)
        if target.lost:
            return
        self._read_at = self._loop.time()
        target.transport.write(data)
        hold_s = self._counter.count(len(data), self._read_at)
        if hold_s > 0.0:
            source.hold(Hold.RATE)
            self._loop.call_later(hold_s, source.release, Hold.RATE)

    def half_close(self, source: SpliceEnd) -> bool:
        """Pass on the end of the data; return whether `source` stays open for data in the other direction."""
        target = self.other(source)
        if target.at_eof or target.lost:
            target.transport.close()
            return False
        target.transport.write_eof()
        return True

    def end_lost(self, end: SpliceEnd, error: Exception | None) -> None:
        """Close the other end.  What was passed on before an orderly end still arrives, if it is taken in time."""
        other = self.other(end)
        if other.lost:
            self._timer.cancel()
        elif error is None:
            other.transport.close()
        else:
            other.transport.abort()

    def _check_idle(self) -> None:
        now = self._loop.time()
        if self._first.held_by_rate or self._second.held_by_rate:
            self._read_at = now
        left_s = self._read_at + self._idle_s - now
        if left_s > 0.0:
            self._timer = self._loop.call_later(left_s, self._check_idle)
            return
        self._first.transport.abort()
        self._second.transport.abort()


def splice(first: SpliceEnd, second: SpliceEnd, counter: ByteCounter | None = None, idle_s: float = IDLE_S) -> None:
    """Join two ends.  From now on, either ends with the other, and both after `idle_s` seconds of silence."""
    joined = _Splice(first, second, counter or ByteCounter(), idle_s)
    for end in (first, second):
        if end.lost:
            joined.other(end).transport.abort()
    first.join(joined)
    second.join(joined)


def _endpoint(name: object) -> tuple[str, int]:
    """Return host and port, or empty ones for a connection that was closed before it could be asked."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else ("", 0)
