"""Compressed rows between toy nodes give the same text, also when nodes are lost and replay logs are replayed."""

import asyncio

import pytest
import zstandard
from tests.sim.test_recovery import slow_links
from tests.support.toy_swarm import SPANS, STATE, ToySwarm, plain_text, toy_swarm

import treeswarm_node.sessions.compression
import treeswarm_node.sessions.server_session
from treeswarm.errors import MissingBlocks
from treeswarm.protocol.messages import LinkHello
from treeswarm.transport.memory import Faults, MemoryNetwork, MemoryStream
from treeswarm.transport.seam import StreamKind
from treeswarm.wire import treeswarm_pb2 as pb
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node.sessions.compression import LinkCompression
from treeswarm_node.sessions.server import NodeServer
from treeswarm_node.sessions.server_session import ServerSession

PROMPT = [1, 2, 3, 4, 0, 1, 2]
COUNT = 60
TWICE = [*SPANS, *SPANS]


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compress all rows, and return the size of each decompressed row.

    A toy's rows are hashes, which no compression makes smaller, so the product would send them as they are.
    """
    decompressed: list[int] = []
    decompress = treeswarm_node.sessions.compression.decompress

    def compress(data: bytes, value_bytes: int) -> bytes:
        planes = b"".join(data[i::value_bytes] for i in range(value_bytes))
        return zstandard.ZstdCompressor().compress(planes)

    def count_and_decompress(data: bytes, value_bytes: int, size: int) -> bytes:
        decompressed.append(size)
        return decompress(data, value_bytes, size)

    monkeypatch.setattr(treeswarm_node.sessions.compression, "compress", compress)
    monkeypatch.setattr(treeswarm_node.sessions.compression, "decompress", count_and_decompress)
    return decompressed


def compress_everywhere(swarm: ToySwarm) -> None:
    for node in swarm.nodes.values():
        node.sessions.compression = LinkCompression("lossless")


async def generate_compressed() -> None:
    """Generate the plain text, and check that nothing is left open."""
    async with toy_swarm(MemoryNetwork(1)) as swarm:
        compress_everywhere(swarm)
        assert await swarm.generate(PROMPT, COUNT) == plain_text(PROMPT, COUNT)
        await asyncio.sleep(120)
        swarm.check_idle()


def test_compressed_rows_give_the_same_text(sizes: list[int]) -> None:
    run_virtually(generate_compressed())
    assert len(sizes) > 20
    assert all(size % STATE == 0 for size in sizes)


@pytest.mark.parametrize("place", [1, 2], ids=["middle", "tail"])
def test_a_replacement_receives_compressed_rows_too(place: int, sizes: list[int]) -> None:
    async def run() -> None:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, spans=TWICE) as swarm:
            compress_everywhere(swarm)
            generating = asyncio.create_task(swarm.generate(PROMPT, COUNT, patience_s=60.0))
            while len(swarm.kept) < 20:
                await asyncio.sleep(0.001)
            assert swarm.chain is not None
            await swarm.kill(swarm.chain.hops[place].address)
            before = len(sizes)
            assert await asyncio.wait_for(generating, 600) == plain_text(PROMPT, COUNT)
            assert len(swarm.chain.repairs) == 1
            assert len(sizes) > before + 10
            await asyncio.sleep(120)
            swarm.check_idle()

    run_virtually(run())


@pytest.mark.parametrize("seed", range(4))
def test_a_terrible_network_does_not_change_the_text(seed: int) -> None:
    faults = Faults(drop=0.02, double=0.05, cut=0.01, kinds=frozenset({StreamKind.LINK}))

    async def run() -> None:
        async with toy_swarm(MemoryNetwork(seed, faults), spans=TWICE) as swarm:
            compress_everywhere(swarm)
            text = await asyncio.wait_for(swarm.generate(PROMPT, COUNT, patience_s=600.0), 30_000)
            assert text == plain_text(PROMPT, COUNT)

    run_virtually(run())


def test_garbled_rows_end_only_their_own_session(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network) as swarm:
            compress_everywhere(swarm)
            generating = asyncio.create_task(swarm.generate(PROMPT, COUNT))
            while len(swarm.kept) < 10:
                await asyncio.sleep(0.001)
            assert swarm.chain is not None
            (link,) = links_to(network, swarm.chain.hops[1].address)
            rows = (b"\0" * 4) * 2
            garbled = pb.Append(
                first_id=1, parents=rows, tokens=rows, hidden=b"no frame", planes=4,
                settings=pb.SamplingSettings(top_p=1.0),
            )  # fmt: skip
            await link.send_bytes(pb.LinkUp(append=garbled).SerializeToString())
            with pytest.raises(MissingBlocks):  # the toy router has no other nodes
                await generating
            assert "cannot be decompressed" in caplog.text
            assert await swarm.generate(PROMPT, COUNT) == plain_text(PROMPT, COUNT)

    run_virtually(run())


def test_a_welcome_that_is_never_sent_blocks_nothing(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    async def never_sent(_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(treeswarm_node.sessions.server_session, "_send_link_welcome", never_sent)

    run_virtually(generate_compressed())
    assert not sizes, "no node announced that it accepts compressed rows"


def links_to(network: MemoryNetwork, address: str) -> list[MemoryStream]:
    return [s for s in network.streams if s.kind is StreamKind.LINK and s.dialled and s.peer == address]


def test_the_client_does_not_compress() -> None:
    async def run() -> None:
        compresses: list[bool] = []
        async with toy_swarm(MemoryNetwork(1)) as swarm:
            compress_everywhere(swarm)
            for node in swarm.nodes.values():
                record_hellos(node, compresses)
            assert await swarm.generate(PROMPT, 10) == plain_text(PROMPT, 10)
            assert swarm.chain is not None
            assert not swarm.chain.repairs
        assert sorted(compresses) == [False, True, True], "the client, and two nodes"

    run_virtually(run())


def record_hellos(node: NodeServer, compresses: list[bool]) -> None:
    honest = node.sessions.authorize_link

    async def welcome(hello: LinkHello) -> ServerSession:
        compresses.append(hello.packs)
        return await honest(hello)

    node.sessions.authorize_link = welcome  # type: ignore[method-assign]
