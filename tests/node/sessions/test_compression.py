"""Rows are compressed where it pays, and only for a next node that said that it decompresses them."""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from treeswarm.errors import Malformed, SwarmError
from treeswarm.protocol.messages import Answers, Append, LinkHello, LinkWelcome, Message, NextHop, NumericsClass
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_node.sessions.compression import LARGE_BYTES, LinkCompression, compress_rows, decompress_rows
from treeswarm_node.sessions.downstream import ToNextNode

FAR = "203.0.113.7:4001"
ROW_BYTES = 64
F32, BF16 = NumericsClass("w", "float32"), NumericsClass("w", "bfloat16")
IN_8_BITS = replace(BF16, activations="int8")


@pytest.mark.parametrize(
    ("compression", "numerics", "next_hop", "expected"),
    [
        (LinkCompression("none"), BF16, FAR, 0),
        (LinkCompression("lossless"), BF16, "127.0.0.1:4001", 2),
        (LinkCompression("lossless", rate=10e9), F32, FAR, 4),
        (LinkCompression("lossless"), IN_8_BITS, FAR, 1),
        (LinkCompression("auto"), BF16, FAR, 2),
        (LinkCompression("auto"), replace(BF16, dtype="float16"), FAR, 2),
        (LinkCompression("auto"), F32, FAR, 0),
        (LinkCompression("auto"), IN_8_BITS, FAR, 0),
        (LinkCompression("auto"), BF16, "127.0.0.1:4001", 0),
        (LinkCompression("auto"), BF16, "[::1]:4001#" + "a" * 32, 0),
        (LinkCompression("auto", host="203.0.113.7"), BF16, FAR, 0),
        (LinkCompression("auto", rate=20e6), BF16, "127.0.0.1:4001", 2),
        (LinkCompression("auto", rate=1e9), BF16, FAR, 0),
        (LinkCompression("auto"), BF16, "no address", 0),
    ],
    ids=range(14),
)
def test_rows_are_compressed_where_it_pays(
    compression: LinkCompression, numerics: NumericsClass, next_hop: str, expected: int
) -> None:
    assert compression.value_bytes(numerics, next_hop) == expected


def append(rows: int = 8, **changes: Any) -> Append:
    """Return an append whose activations compress well."""
    plain = Append(
        epoch=0,
        seq=0,
        commit=np.empty(0, np.uint32),
        first_id=1,
        parents=np.arange(rows, dtype=np.uint32),
        tokens=np.ones(rows, np.uint32),
        prefill=True,
        answers=Answers.NONE,
        settings=SamplingSettings(),
        skipped=np.zeros(rows, np.bool_),
        hidden=bytes([7, 63]) * (rows * ROW_BYTES // 2),
        replay=True,
    )
    return replace(plain, **changes)


def test_decompression_restores_rows_without_the_skipped_ones() -> None:
    skipped = np.array([False, True] * 4)
    plain = append(hidden=bytes([7, 63]) * (4 * ROW_BYTES // 2), skipped=skipped)
    compressed = compress_rows(plain, 2)
    assert compressed.planes == 2
    assert len(compressed.hidden) < len(plain.hidden)
    restored = decompress_rows(compressed, ROW_BYTES)
    assert (restored.hidden, restored.planes) == (plain.hidden, 0)
    for row_bytes in (0, ROW_BYTES - 2, ROW_BYTES + 2):
        with pytest.raises(Malformed):
            decompress_rows(compressed, row_bytes)


def test_rows_that_do_not_compress_are_left_as_they_are() -> None:
    noise = append(hidden=np.random.default_rng(0).bytes(8 * ROW_BYTES))
    assert compress_rows(noise, 2) is noise


@dataclass
class FakeNextNode:
    """A next node that may send a welcome, and records the messages that come down its link."""

    welcome: Message | None
    received: list[Message] = field(default_factory=list)
    greeted: asyncio.Event = field(default_factory=asyncio.Event)
    errors: list[SwarmError] = field(default_factory=list)

    async def accept(self, kind: StreamKind, stream: Stream) -> None:
        assert kind is StreamKind.LINK
        self.received.append(await stream.receive() or pytest.fail("no hello"))
        if self.welcome is not None:
            await stream.send(self.welcome)
        self.greeted.set()
        while (message := await stream.receive()) is not None:
            self.received.append(message)

    async def receive(self, sent: Append, value_bytes: int) -> tuple[LinkHello, Append]:
        """Return the hello and the append that arrive if the append is sent after the welcome has come."""
        network = MemoryNetwork()
        listener = await network.transport().listen("127.0.0.1:0", self.accept)
        hop = NextHop(listener.address, bytes(16))
        downstream = ToNextNode(bytes(16), 0, hop, network.transport(), 0, self.errors.append, value_bytes)
        await self.greeted.wait()
        await asyncio.sleep(0.05)
        await downstream.replay(sent)
        await asyncio.sleep(0.05)
        await downstream.end()
        await listener.close()
        hello, append = self.received
        assert isinstance(hello, LinkHello)
        assert isinstance(append, Append)
        return hello, append


@pytest.mark.parametrize("welcome", [None, LinkWelcome(unpacks=False)], ids=["older release", "does not decompress"])
async def test_rows_stay_plain_for_nodes_that_do_not_decompress(welcome: LinkWelcome | None) -> None:
    node = FakeNextNode(welcome)
    hello, arrived = await node.receive(append(), 2)
    assert hello.packs
    assert (arrived.planes, arrived.hidden) == (0, append().hidden)
    assert not node.errors


@pytest.mark.parametrize("rows", [8, LARGE_BYTES // ROW_BYTES], ids=["small", "large"])
async def test_rows_are_compressed_for_nodes_that_decompress(rows: int) -> None:
    node = FakeNextNode(LinkWelcome(unpacks=True))
    sent = append(rows)
    _, arrived = await node.receive(sent, 2)
    assert arrived.planes == 2
    assert decompress_rows(arrived, ROW_BYTES).hidden == sent.hidden
    assert not node.errors


async def test_a_node_that_does_not_compress_accepts_no_welcome() -> None:
    node = FakeNextNode(LinkWelcome(unpacks=True))
    hello, arrived = await node.receive(append(), 0)
    assert not hello.packs
    assert arrived.planes == 0
    (error,) = node.errors
    assert "unexpected LinkWelcome" in str(error)
