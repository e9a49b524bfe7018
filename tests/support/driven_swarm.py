"""A toy swarm whose nodes may drive, and clients that let them: the product's loop, driver and streams, no model."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.toy_swarm import BLOCKS, NUMERICS, VOCAB, GuessingDrafter, ToySwarm

from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.protocol.records import NodeRecord, NodeState, SealedRecord
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import RULES_VERSION, RulesRequest, TextRules
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.topology.coordinates import Coordinate
from treeswarm.transport.memory import MemoryTransport
from treeswarm.transport.seam import Transport
from treeswarm_client.client_settings import SessionSettings
from treeswarm_client.discovery.route import Target, needs_of
from treeswarm_client.discovery.swarm_view import SwarmView
from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.drafters.suffix import SuffixDrafter
from treeswarm_client.drafters.tail.tail_drafter import TailDrafter
from treeswarm_client.drafters.token_recycling import TokenRecyclingDrafter
from treeswarm_client.drafters.union import UnionDrafter, UnionMember
from treeswarm_client.driving.driver import DriverLimits, TextDriver
from treeswarm_client.driving.drivers import Drivers
from treeswarm_client.generation.drafter_pool import DrafterPool
from treeswarm_client.generation.loop import GenerationLimits
from treeswarm_client.generation.run import Request, Run
from treeswarm_client.generation.runner import GenerationRunner
from treeswarm_client.generation.token_logprobs import LogprobWishes
from treeswarm_client.prompt_encoder import check_request
from treeswarm_node.driving import ShortWay

TARGET = Target(NUMERICS, BLOCKS, VOCAB, 4, 2048)


class SpokenTokens:
    """A tokenizer that writes ids as digits."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(str, ids))


def node_name(address: str) -> bytes:
    """Return the 32 bytes that stand for the key of the node at an address."""
    return address.encode().ljust(32, b"\0")


@dataclass(eq=False)
class DrivenSwarm:
    """Toy nodes with records, some of which offer a driver."""

    toys: ToySwarm
    offers: dict[str, DriverKind] = field(default_factory=dict)
    positions: dict[str, Coordinate] = field(default_factory=dict)
    """Network coordinate of each node, by address."""
    drivers: dict[str, TextDriver] = field(default_factory=dict)

    def offer(
        self, address: str, kind: DriverKind = DriverKind.TABLES, *, draft: str = "guessing", **limits: Any
    ) -> TextDriver:
        """Have the node at `address` drive texts."""
        # As in the product, the node dials itself without a link.
        way = ShortWay(self.toys.network.transport(), MemoryTransport(self.toys.network), lambda: address, address)
        driver = TextDriver(lambda: self.client("self", way, draft=draft), DriverLimits(**limits))  # type: ignore[arg-type, return-value]
        self.toys.nodes[address].driver = driver
        self.offers[address], self.drivers[address] = kind, driver
        return driver

    def records(self) -> tuple[SealedRecord, ...]:
        """Return the records of all nodes."""
        return tuple(SealedRecord(self._record(address), b"") for address in self.toys.spans)

    def _record(self, address: str) -> NodeRecord:
        place = self.positions.get(address, Coordinate(error=0.1))
        return NodeRecord(
            key=node_name(address),
            generation=1,
            expires=2**40,
            state=NodeState.ONLINE,
            address=address,
            pin="",
            reachable=True,
            name="toy",
            model="toy",
            numerics=NUMERICS,
            span=self.toys.spans[address],
            blocks=BLOCKS,
            rate=1e6,
            hop_s=0.0,
            free_tokens=4096,
            total_tokens=4096,
            coordinate=(place.x, place.y, place.height_s, place.error),
            software="toy",
            driver=self.offers.get(address, DriverKind.NONE),
            speculator="toy" if address in self.toys.speculating else "",
            rules=RULES_VERSION,
        )

    def client(self, drive: str, transport: Transport | None = None, draft: str = "guessing") -> "DrivenClient":
        """Return a client whose texts are driven as `drive` says."""
        return DrivenClient(self, drive, transport or self.toys.network.transport(), draft)

    def check_idle(self) -> None:
        """Check that no text is driven, and that nothing is left of any session."""
        assert not any(driver.hosts for driver in self.drivers.values())
        self.toys.check_idle()


@dataclass(eq=False)
class DrivenClient:
    """Stands for a `SwarmClient` without a model."""

    swarm: DrivenSwarm
    drive: str
    transport: Transport
    drafter: str
    """`guessing`, `ngram`, `tail` or `tail+ngram`."""
    draft: DriverKind = DriverKind.TABLES
    target: Target = TARGET
    runs: list[Run] = field(default_factory=list)

    async def __aenter__(self) -> "DrivenClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(run.end(10.0) for run in self.runs))

    def drivers(self) -> Drivers:
        """Return what finds drivers for this client, by the records of now."""
        view = SwarmView(MemoryRegistry("toy"), TARGET, 5, snapshot=self.swarm.records())
        return Drivers(self.drive, view, self.transport, self.draft, VOCAB)

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        tree_size: int | str = 4,
        seed: int = 0,
        sample: int = 0,
        stop_token_ids: Sequence[int] = (),
        prefix_secret: bytes = b"s" * 16,
        patience: float = 30.0,
        stops: tuple[str, ...] = (),
        rules: TextRules = TextRules(),  # noqa: B008  # frozen
        generated_tokens: int = 0,
        wishes: LogprobWishes = LogprobWishes(),  # noqa: B008  # frozen
        temperature: float = 0.0,
        **settings: Any,
    ) -> Run:
        check_request(prompt, max_new_tokens, VOCAB, TARGET.max_positions, least=0)
        loop, drivers = asyncio.get_running_loop(), self.drivers()
        runner = GenerationRunner(
            self.transport,
            drivers.view,
            TARGET,
            DrafterPool(make_drafter(self.drafter, seed) if tree_size else NoneDrafter()),
            SpokenTokens(),  # type: ignore[arg-type]
            drivers,
        )
        limits = GenerationLimits(max_new_tokens, frozenset(stop_token_ids))
        sampling = SamplingSettings(temperature, seed=seed, sample=sample)
        asked = None if rules.neutral else RulesRequest(rules, len(prompt) - generated_tokens)
        clock, needs = loop.time, needs_of(rules, ())
        request = Request(sampling, limits, stops, tree_size, None, prefix_secret, clock, asked, needs, wishes)  # type: ignore[arg-type]
        run = Run(tokens=None, prompt_ids=list(prompt))  # type: ignore[arg-type]
        session = SessionSettings(patience, patience, prefix_scope="none", clock=loop.time)
        run.tokens = self._tokens(runner, run, request, session)
        self.runs.append(run)
        return run

    async def _tokens(self, runner: GenerationRunner, run: Run, request: Request, session: SessionSettings) -> Any:
        run.iteration.task = asyncio.current_task()
        try:
            async with contextlib.aclosing(runner.stream(run, request, session)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            run.iteration.ended.set()


def make_drafter(name: str, seed: int) -> Drafter:
    """Return a drafter that needs no model."""
    if name == "guessing":
        return GuessingDrafter(seed)
    if name == "tail":
        return TailDrafter()
    tables: list[UnionMember] = [SuffixDrafter(), TokenRecyclingDrafter()]
    return UnionDrafter([*tables, TailDrafter()] if name == "tail+ngram" else tables)


async def finish(run: Run) -> list[int]:
    """Iterate a run to its end, and return its tokens."""
    async for _ in run:
        pass
    return run.token_ids
