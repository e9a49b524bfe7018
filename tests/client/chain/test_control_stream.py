"""The control stream of a client reports each break once."""

import asyncio
import gc
from typing import Any

import pytest

from treeswarm.errors import LinkBroken
from treeswarm.protocol.messages import Resume, Resumption
from treeswarm.protocol.spans import Span
from treeswarm.transport.seam import StreamKind
from treeswarm_client.chain.control_stream import ControlHandlers, NodeControl
from treeswarm_client.discovery.route import Hop


class BreakingStream:
    """A stream that breaks during a send: the receiver gets the error first, then the sender too."""

    peer = "node:1"

    def __init__(self) -> None:
        self.broken = asyncio.Event()

    async def send(self, message: object) -> None:
        if not isinstance(message, Resume):
            await asyncio.Event().wait()
        self.broken.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        raise LinkBroken("it broke")

    async def receive(self) -> object:
        await self.broken.wait()
        raise LinkBroken("it broke")

    async def end(self) -> None: ...


class BreakingTransport:
    async def connect(self, address: str, kind: StreamKind) -> Any:
        return BreakingStream()


async def test_a_break_during_a_request_is_reported_once() -> None:
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    hop = Hop("01" * 16, "node:1", Span(0, 4))
    control = NodeControl(hop, b"s" * 16, ControlHandlers(*[lambda *_: None] * 4))
    await control.connect(BreakingTransport())  # type: ignore[arg-type]
    with pytest.raises(LinkBroken, match="it broke"):
        await control.request(Resume(1, b"s" * 16, 2, Resumption(1, 0), b"t" * 16, None, replays=False))
    await control.close_session()
    del control
    gc.collect()
    await asyncio.sleep(0)
    assert not unhandled
