"""Tests of the gateway's connection while the swarm becomes complete."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from treeswarm.errors import BadRequest, MissingBlocks, SwarmError
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.gateway.backend import FIRST_PAUSE_S, SwarmConnection
from treeswarm_client.gateway.browser.watchers import POLL_S
from treeswarm_client.gateway.errors import NotReady, failure_of


@dataclass(eq=False)
class FakeProber:
    """A prober that needs `seconds` to ping its nodes."""

    name: str
    seconds: float

    async def probe_due(self) -> bool:
        await asyncio.sleep(self.seconds)
        return True

    async def current_overview(self) -> Any:
        return SimpleNamespace(as_dict=lambda: {"prober": self.name})


@dataclass(eq=False)
class FakeClient:
    """A client that raises `error` when it is opened, or opens if there is none."""

    error: SwarmError | None
    lookout_s: float = 0.0
    """Seconds until the lookout's registry is open."""
    draft_choice: Any = field(default_factory=lambda: SimpleNamespace(automatic=False))

    async def __aenter__(self) -> "FakeClient":
        if self.error is not None:
            raise self.error
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def prober(self) -> FakeProber:
        return FakeProber("client", 0.0)

    @contextlib.asynccontextmanager
    async def lookout(self) -> AsyncIterator[FakeProber]:
        await asyncio.sleep(self.lookout_s)
        yield FakeProber("lookout", 60.0)


def connect(*clients: FakeClient) -> SwarmConnection:
    left = list(clients)
    # The last client also opens lookouts.
    return SwarmConnection(lambda: left.pop(0) if left[1:] else left[0])  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("lookout_s", [0.0, 2 * FIRST_PAUSE_S])
def test_map_goes_on_when_the_swarm_is_found(lookout_s: float) -> None:
    """The lookout's probes are under way then, or its registry is still being opened."""

    async def run() -> None:
        gap = FakeClient(MissingBlocks("blocks 0:3 are missing"))
        connection = connect(gap, FakeClient(None, lookout_s))
        async with connection.open():
            first = await connection.read_overview()
            assert FIRST_PAUSE_S < POLL_S
            assert (first["kind"], first["why"], first["prober"]) == ("overview", "", "client")
            assert (await connection.read_overview())["prober"] == "client"

    run_virtually(run())


def test_reason_of_the_last_attempt_is_told() -> None:
    async def run() -> None:
        gap, refusal = MissingBlocks("blocks 0:3 are missing"), BadRequest("the broker refuses user 'me'")
        connection = connect(FakeClient(gap), FakeClient(refusal))
        async with connection.open():
            await asyncio.sleep(2 * FIRST_PAUSE_S)
            with pytest.raises(NotReady) as caught:
                _ = connection.client
        assert failure_of(caught.value).message == str(refusal)
        assert failure_of(caught.value).status == 503

    run_virtually(run())
