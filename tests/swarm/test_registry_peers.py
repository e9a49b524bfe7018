"""A client that asks nodes goes on to others when those it was told of are gone."""

import asyncio
import time

import pytest

from treeswarm.messages import Records
from treeswarm.registry.peers import PeersRegistry
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind

from ..registry_media import MODEL, Node
from ..virtual_clock import run_virtually


@pytest.mark.parametrize("typed", [1, 3])
def test_known_nodes_take_the_place_of_named_ones_that_are_gone(typed: int) -> None:
    """However many were named, and though some of the known ones are gone as well."""

    async def run() -> None:
        network = MemoryNetwork()
        told: list[bytes] = []
        asked: list[str] = []

        async def tell(kind: StreamKind, stream: Stream) -> None:
            await stream.receive()
            asked.append(stream.host)  # type: ignore[attr-defined]
            await stream.send(Records(tuple(told)))
            await stream.receive()

        listeners = [await network.transport().listen("127.0.0.1:0", tell) for _ in range(typed + 8)]
        ports = [int(listener.address.rpartition(":")[2]) for listener in listeners]
        told += [Node().record(port, pin="").sealed for port in ports[typed:]]
        named = tuple(listener.address for listener in listeners[:typed])
        registry = PeersRegistry(MODEL, time.time, transport=network.transport(), addresses=named, everyone=True)
        await registry.start()
        for listener in listeners[:-1]:
            await listener.close()
            network.cut_off(listener.address)
        asked.clear()
        await asyncio.sleep(60)
        assert listeners[-1].address in asked
        await registry.close()

    run_virtually(run())
