"""What is the node-told registry's alone: which nodes it asks."""

import asyncio

from treeswarm.messages import Records, Watch
from treeswarm.registry.peers import SOURCES, PeersRegistry
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Stream

from ..registry_media import MODEL, Node
from ..virtual_clock import run_virtually


def test_when_all_typed_addresses_are_gone_nodes_heard_of_take_their_place() -> None:
    """However many were typed: dead ones must not be asked for ever instead."""

    async def run() -> None:
        network, nodes = MemoryNetwork(), [Node() for _ in range(12)]
        records = [node.record(4001 + i).sealed for i, node in enumerate(nodes)]
        asked: set[int] = set()

        async def tell(number: int, stream: Stream) -> None:
            assert isinstance(await stream.receive(), Watch)
            asked.add(number)
            await stream.send(Records(tuple(records)))
            await asyncio.Event().wait()

        listeners = [
            await network.transport().listen(f"127.0.0.1:{4001 + i}", lambda _, stream, i=i: tell(i, stream))  # type: ignore[misc]
            for i in range(12)
        ]
        typed = tuple(f"127.0.0.1:{4001 + i}" for i in range(6))
        registry = PeersRegistry(MODEL, transport=network.transport(), addresses=typed)
        await registry.start()
        assert len(await registry.snapshot()) == 12
        for listener in listeners[:6]:
            await listener.close()
        await asyncio.sleep(60)
        later = asked - set(range(6))
        assert SOURCES <= len(later) <= 6
        newcomer = Node()
        records.append(newcomer.record(5000).sealed)
        for listener in listeners[6:]:
            await listener.close()
        await network.transport().listen("127.0.0.1:4012", lambda _, stream: tell(99, stream))
        await asyncio.sleep(60)
        assert len(await registry.snapshot()) == 13
        await registry.close()

    run_virtually(run())
