"""One conformance suite for the registry seam."""

import asyncio
from collections.abc import Callable

import pytest

from treeswarm.errors import BadRequest
from treeswarm.registry import parse_registry
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.registry.seam import NodeRecord, Registry
from treeswarm.registry.static import StaticRegistry

ADAPTERS: list[Callable[[], Registry]] = [MemoryRegistry, StaticRegistry]


@pytest.fixture(params=ADAPTERS)
def registry(request: pytest.FixtureRequest) -> Registry:
    made: Registry = request.param()
    return made


async def test_what_is_announced_is_known_until_withdrawn(registry: Registry) -> None:
    await registry.announce(NodeRecord("a:1"))
    await registry.announce(NodeRecord("b:2"))
    await registry.announce(NodeRecord("a:1"))
    assert [record.address for record in await registry.snapshot()] == ["a:1", "b:2"]
    await registry.withdraw("a:1")
    await registry.withdraw("never:1")
    assert await registry.snapshot() == (NodeRecord("b:2"),)


async def test_a_watcher_sees_the_present_and_every_change(registry: Registry) -> None:
    await registry.announce(NodeRecord("a:1"))
    watch = registry.watch()
    assert await asyncio.wait_for(anext(watch), 5) == (NodeRecord("a:1"),)
    await registry.announce(NodeRecord("b:2"))
    assert len(await asyncio.wait_for(anext(watch), 5)) == 2
    await registry.withdraw("a:1")
    assert await asyncio.wait_for(anext(watch), 5) == (NodeRecord("b:2"),)


async def test_a_static_spec_is_a_list_of_addresses() -> None:
    found = await parse_registry("static:10.0.0.1:4001, 10.0.0.2:4002,10.0.0.1:4001").snapshot()
    assert [record.address for record in found] == ["10.0.0.1:4001", "10.0.0.2:4002"]


@pytest.mark.parametrize("spec", ["", "static:", "static:,", "static:nowhere", "10.0.0.1:4001", "dht:x"])
def test_what_is_no_registry_is_refused(spec: str) -> None:
    with pytest.raises(BadRequest):
        parse_registry(spec)
