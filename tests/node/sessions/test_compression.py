"""When rows are packed on their way, and for whom: never for a node that has not said that it unpacks."""

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
    ("packing", "numerics", "next_hop", "expected"),
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
def test_rows_are_packed_where_it_pays(
    packing: LinkCompression, numerics: NumericsClass, next_hop: str, expected: int
) -> None:
    assert packing.value_bytes(numerics, next_hop) == expected


def append(rows: int = 8, **changes: Any) -> Append:
    """Of activations that pack well."""
    made = Append(
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
    return replace(made, **changes)


def test_rows_come_back_as_they_were_without_those_that_were_skipped() -> None:
    skipped = np.array([False, True] * 4)
    plain = append(hidden=bytes([7, 63]) * (4 * ROW_BYTES // 2), skipped=skipped)
    small = compress_rows(plain, 2)
    assert small.planes == 2
    assert len(small.hidden) < len(plain.hidden)
    back = decompress_rows(small, ROW_BYTES)
    assert (back.hidden, back.planes) == (plain.hidden, 0)
    for row_bytes in (0, ROW_BYTES - 2, ROW_BYTES + 2):
        with pytest.raises(Malformed):
            decompress_rows(small, row_bytes)


def test_rows_that_would_not_become_smaller_go_as_they_are() -> None:
    noise = append(hidden=np.random.default_rng(0).bytes(8 * ROW_BYTES))
    assert compress_rows(noise, 2) is noise


@dataclass
class Next:
    """The next node: what came down its link, and a word that it may say first."""

    welcome: Message | None
    heard: list[Message] = field(default_factory=list)
    said: asyncio.Event = field(default_factory=asyncio.Event)
    complaints: list[SwarmError] = field(default_factory=list)

    async def accept(self, kind: StreamKind, stream: Stream) -> None:
        assert kind is StreamKind.LINK
        self.heard.append(await stream.receive() or pytest.fail("no hello"))
        if self.welcome is not None:
            await stream.send(self.welcome)
        self.said.set()
        while (message := await stream.receive()) is not None:
            self.heard.append(message)

    async def hears(self, sent: Append, value_bytes: int) -> tuple[LinkHello, Append]:
        """What arrives of an append that leaves after the next node's first word has come."""
        network = MemoryNetwork()
        listener = await network.transport().listen("127.0.0.1:0", self.accept)
        hop = NextHop(listener.address, bytes(16))
        outlet = ToNextNode(bytes(16), 0, hop, network.transport(), 0, self.complaints.append, value_bytes)
        await self.said.wait()
        await asyncio.sleep(0.05)
        await outlet.replay(sent)
        await asyncio.sleep(0.05)
        await outlet.end()
        await listener.close()
        hello, append = self.heard
        assert isinstance(hello, LinkHello)
        assert isinstance(append, Append)
        return hello, append


@pytest.mark.parametrize("welcome", [None, LinkWelcome(unpacks=False)], ids=["of before packing", "does not unpack"])
async def test_who_does_not_say_that_it_unpacks_is_sent_rows_as_they_are(welcome: LinkWelcome | None) -> None:
    node = Next(welcome)
    hello, came = await node.hears(append(), 2)
    assert hello.packs
    assert (came.planes, came.hidden) == (0, append().hidden)
    assert not node.complaints


@pytest.mark.parametrize("rows", [8, LARGE_BYTES // ROW_BYTES], ids=["small", "large"])
async def test_who_says_that_it_unpacks_is_sent_packed_rows(rows: int) -> None:
    node = Next(LinkWelcome(unpacks=True))
    sent = append(rows)
    _, came = await node.hears(sent, 2)
    assert came.planes == 2
    assert decompress_rows(came, ROW_BYTES).hidden == sent.hidden
    assert not node.complaints


async def test_a_node_that_does_not_pack_asks_nothing_and_takes_no_welcome() -> None:
    node = Next(LinkWelcome(unpacks=True))
    hello, came = await node.hears(append(), 0)
    assert not hello.packs
    assert came.planes == 0
    (complaint,) = node.complaints
    assert "unexpected LinkWelcome" in str(complaint)
