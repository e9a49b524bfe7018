"""Two joined connections keep order, ends, back-pressure and rate."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from tests.support.port_peers import SOON_S, wait_until

from treeswarm_node.reachability.tcp_splice import READ_BYTES, WAITING_BYTES, ByteCounter, SpliceEnd, new_buffer, splice


@contextlib.asynccontextmanager
async def spliced(counter: ByteCounter | None = None, idle_s: float = 60.0) -> AsyncIterator[tuple[socket.socket, ...]]:
    """Yield two sockets, each the remote side of one end, and the two joined ends."""
    loop, buffer = asyncio.get_running_loop(), new_buffer()
    near, far = [], []
    for _ in range(2):
        inside, outside = socket.socketpair()
        for end_socket in (inside, outside):
            end_socket.setblocking(False)
            end_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        _, end = await loop.create_connection(lambda: SpliceEnd(buffer), sock=inside)
        near.append(end)
        far.append(outside)
    splice(near[0], near[1], counter, idle_s)
    try:
        yield far[0], far[1], *near  # type: ignore[misc]
    finally:
        for end in near:
            end.transport.abort()
        for end_socket in far:
            end_socket.close()
        await asyncio.sleep(0)


async def test_a_slow_reader_holds_its_sender_back() -> None:
    loop = asyncio.get_running_loop()
    async with spliced() as (left, right, _, end):
        sent_bytes, data = 0, bytes(1 << 16)
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(0.5):
                    await loop.sock_sendall(left, data)
                sent_bytes += len(data)
        waiting = end.transport.get_write_buffer_size()  # type: ignore[attr-defined]
        assert 0 < waiting <= WAITING_BYTES + READ_BYTES
        assert sent_bytes <= WAITING_BYTES + READ_BYTES + (1 << 18)  # and what the kernel's four small buffers hold
        received = 0
        while received < sent_bytes:
            received += len(await asyncio.wait_for(loop.sock_recv(right, 1 << 16), SOON_S))


async def test_a_half_closed_splice_still_carries_the_other_way() -> None:
    loop = asyncio.get_running_loop()
    async with spliced() as (left, right, *ends):
        await loop.sock_sendall(left, b"question")
        left.shutdown(socket.SHUT_WR)
        assert await asyncio.wait_for(loop.sock_recv(right, 100), SOON_S) == b"question"
        assert await asyncio.wait_for(loop.sock_recv(right, 100), SOON_S) == b""
        await loop.sock_sendall(right, b"answer")
        right.shutdown(socket.SHUT_WR)
        assert await asyncio.wait_for(loop.sock_recv(left, 100), SOON_S) == b"answer"
        assert await asyncio.wait_for(loop.sock_recv(left, 100), SOON_S) == b""
        await wait_until(lambda: all(end.lost for end in ends))


async def test_a_silent_splice_is_closed() -> None:
    loop = asyncio.get_running_loop()
    async with spliced(idle_s=0.2) as (left, right, *ends):
        await loop.sock_sendall(left, b"x")
        assert await asyncio.wait_for(loop.sock_recv(right, 1), SOON_S) == b"x"
        await wait_until(lambda: all(end.lost for end in ends))


async def test_a_limited_rate_slows_down_and_loses_nothing() -> None:
    loop = asyncio.get_running_loop()
    async with spliced(ByteCounter(1 << 20), idle_s=0.05) as (left, right, *_):
        sending = asyncio.create_task(loop.sock_sendall(left, bytes(1 << 18)))
        start, received = loop.time(), 0
        while received < 1 << 18:
            received += len(await asyncio.wait_for(loop.sock_recv(right, 1 << 16), SOON_S))
        await sending
        assert loop.time() - start > 0.15
