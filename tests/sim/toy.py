"""A toy swarm: real nodes, sessions, chains and clients; a model that is a hash; a network of one's choosing."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.messages import NumericsClass
from treeswarm.sampling import SamplingSettings
from treeswarm.session import incoming_rows
from treeswarm.spans import Span
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.walk import Walk
from treeswarm_client.chain import describe, open_chain
from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.generation import Generation, Limits
from treeswarm_client.route import plan_route
from treeswarm_client.session import ClientSession
from treeswarm_node.batch import Segment
from treeswarm_node.config import Limits as NodeLimits
from treeswarm_node.device import Computed
from treeswarm_node.engine import Engine
from treeswarm_node.kv import KVShape, KVStore
from treeswarm_node.node import Node, Served

VOCAB, STATE = 5, 16
SPANS = [Span(0, 1), Span(1, 3), Span(3, 4)]


def mix(stage: int, context: Sequence[int], incoming: bytes) -> bytes:
    """A stage's activations of one row: any change of context or input changes all of it."""
    return hashlib.blake2b(bytes([stage, *context]) + incoming, digest_size=STATE).digest()


def toy_token(context: Sequence[int]) -> int:
    """What the whole model says after `context`."""
    state = b""
    for span in SPANS:
        state = mix(span.start, context, state)
    return state[0] % VOCAB


def plain_text(prompt: Sequence[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(toy_token(text))
    return text[len(prompt) :]


@dataclass
class ToyDevice:
    """Keeps each session's trunk and crown as tokens, the way a KV cache keeps rows, and hashes what each row sees."""

    blocks: int = 4
    trunks: dict[int, list[int]] = field(default_factory=dict)
    crowns: dict[int, dict[int, int]] = field(default_factory=dict)

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        return [self._step(segment) for segment in segments]

    def _step(self, segment: Segment) -> Computed:
        step, key = segment.step, id(segment.kv)
        trunk, crown = self.trunks.setdefault(key, []), self.crowns.setdefault(key, {})
        trunk += [crown[slot] for slot in step.commit_slots.tolist()]
        assert len(trunk) == step.trunk_length
        if step.append.prefill:
            contexts = [[*trunk, *step.tokens[: i + 1].tolist()] for i in range(step.rows)]
            trunk += step.tokens.tolist()
        else:
            crown.update(zip(step.slots.tolist(), step.tokens.tolist(), strict=True))
            contexts = [self._seen(trunk, crown, step.visible[i]) for i in range(step.rows)]
            assert [len(c) - 1 for c in contexts] == step.positions.tolist()
        sent = [step.append.hidden[i * STATE : (i + 1) * STATE] for i in incoming_rows(step)]
        states = [
            mix(segment.span.start, context, sent[i] if segment.span.start else b"")
            for i, context in enumerate(contexts)
        ]
        if segment.span.end < self.blocks:
            return Computed(hidden=b"".join(states))
        tokens = np.array([states[i][0] % VOCAB for i in step.answered], np.int64)
        return Computed(tokens=tokens, logprobs=np.zeros(len(tokens), np.float32))

    def _seen(self, trunk: list[int], crown: dict[int, int], visible: NDArray[np.bool_]) -> list[int]:
        # Slots fill from the lowest, so within one tree a parent's slot is below its child's.
        return [*trunk, *(crown[slot] for slot in np.flatnonzero(visible).tolist())]


@dataclass
class GuessingDrafter:
    """Knows the toy model and says the truth with some luck, beside lies; a seeded one for each test."""

    seed: int
    luck: float = 0.7
    name: str = "guessing"

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        self._text, self._random = list(prompt), np.random.default_rng(self.seed)

    def propose(self, size: int, depth: int) -> DraftTree:
        parents: list[int] = []
        tokens: list[int] = []
        depths = {-1: 0}
        paths = {-1: list(self._text)}
        while len(tokens) < size:
            parent = (
                int(self._random.integers(-1, len(tokens))) if self._random.random() > self.luck else len(tokens) - 1
            )
            truth = toy_token(paths[parent])
            token = truth if self._random.random() < self.luck else int(self._random.integers(VOCAB))
            taken = any(p == parent and t == token for p, t in zip(parents, tokens, strict=True))
            if taken or depths[parent] >= depth:
                size -= 1
                continue
            node = len(tokens)
            parents.append(parent)
            tokens.append(token)
            depths[node], paths[node] = depths[parent] + 1, [*paths[parent], token]
        scores = -np.arange(len(tokens), dtype=np.float32)
        return DraftTree(np.array(parents, np.int64), np.array(tokens, np.int64), scores)

    def observe(self, tree: DraftTree, answers: NDArray[np.int64], accepted: Sequence[int], bonus: int) -> None:
        self._text += [*(int(tree.tokens[i]) for i in accepted), bonus]


@dataclass
class ToySwarm:
    """Three nodes on a memory network."""

    network: MemoryNetwork
    nodes: list[Node]
    addresses: list[str]

    async def generate(
        self, prompt: Sequence[int], count: int, *, tree_size: int = 6, seed: int = 0, segment_rows: int = 4
    ) -> list[int]:
        """One generation; what was committed before an error is in `self.kept`."""
        kept: list[int] = []
        self.kept = kept
        transport = self.network.transport()
        described = {address: await describe(transport, address) for address in self.addresses}
        route = plan_route(described, config="toy")
        async with open_chain(transport, route, trunk_room=len(prompt) + count, crown_room=tree_size + 1) as chain:
            session = ClientSession(SamplingSettings(), segment_rows)
            limits = Limits(count, frozenset())
            generation = Generation(chain, GuessingDrafter(seed), session, limits, tree_size)
            async for news in generation.rounds(prompt, SamplingSettings()):
                kept += news.tokens
        return kept


@contextlib.asynccontextmanager
async def toy_swarm(network: MemoryNetwork, limits: NodeLimits | None = None) -> AsyncIterator[ToySwarm]:
    """Start the nodes; stop them on leaving."""
    numerics = NumericsClass("toy", "float32")
    nodes, addresses, running, listeners = [], [], [], []
    for span in SPANS:
        store = KVStore(1, KVShape(1, 1, 1), 4096, torch.float32, torch.device("cpu"))
        engine = Engine(ToyDevice(), (limits or NodeLimits()).budget)
        served = Served(span, 4, VOCAB, 4, 2048, "toy", numerics, "toy", STATE)
        transport = network.transport()
        node = Node(served, engine, store, transport, limits or NodeLimits())
        listener = await transport.listen("127.0.0.1:0", node.accept)
        running.append(asyncio.create_task(engine.run()))
        nodes.append(node)
        listeners.append(listener)
        addresses.append(listener.address)
    try:
        yield ToySwarm(network, nodes, addresses)
    finally:
        for node in nodes:
            await node.close()
        for listener in listeners:
            await listener.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


__all__ = ["GuessingDrafter", "ToySwarm", "Walk", "plain_text", "toy_swarm"]
