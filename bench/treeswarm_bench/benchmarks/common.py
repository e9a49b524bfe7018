"""What every bench shares: a swarm of processes, a client on it, and a record of what was measured on what."""

import contextlib
import statistics
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeswarm.keys import read_swarm_key
from treeswarm.model_files import read_shape, resolve_model
from treeswarm_bench.bench_client import BenchClient
from treeswarm_bench.benchmarks.widened_model import Widened
from treeswarm_client.generation.run import Run, TreeSize
from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm
from treeswarm_client.provenance import chain_provenance, machine_provenance

# Of a number, as nodes keep it.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class BenchSetup:
    """What `swarm bench` was told."""

    model: str = "demo"
    draft: str = "demo-draft"
    dtype: str = "float32"
    nodes: int = 3
    prompts: int = 8
    tokens: int = 64
    swarm_key: Path | None = None
    prompt_tokens: int | None = None
    """Cut the prompts to so many."""
    peers: str | None = None
    """Nodes that run already, wherever they are, instead of ones that the bench starts here."""
    quantization: str | None = None
    """Of the weights of nodes that the bench starts; None: as they are."""
    widened: Widened | None = None
    """Where `model` is a wider copy of another for the time of the bench."""

    @property
    def key(self) -> bytes | None:
        """Raises BadRequest."""
        return read_swarm_key(self.swarm_key) if self.swarm_key else None

    def told_model(self) -> dict[str, Any]:
        """For provenance: the model as it was named, and how much wider it was made."""
        if self.widened is None:
            return {"model": self.model}
        mib = self.widened.block_weights * BYTES[self.dtype] / 2**20
        return {"model": self.widened.of, "widen": self.widened.times, "block_weights_mib": mib}


@dataclass(frozen=True)
class Bench:
    """A running swarm and a client of it.  `swarm` has no nodes where they were running already."""

    setup: BenchSetup
    swarm: LocalSwarm
    client: BenchClient
    link: str | None

    @property
    def addresses(self) -> list[str]:
        """The nodes', in the order of their blocks."""
        return self.client.addresses

    async def run(
        self, prompt: Sequence[int], *, tree_size: TreeSize, tokens: int | None = None, **sampling: Any
    ) -> Run:
        """One whole generation that no stop token ends.  Raises what broke it: a bench with a dead node is no bench."""
        return await self.client.generate(
            prompt, max_new_tokens=tokens or self.setup.tokens, tree_size=tree_size, ignore_eos=True, **sampling
        )

    async def provenance(self) -> dict[str, Any]:
        """Return versions, weights, links, and what each node computed.  Raises SwarmError if a node is gone."""
        named = {
            "draft": self.setup.draft,
            "quantization": self.setup.quantization or "none",
            "link": self.link or ("as it is" if self.setup.peers else "loopback"),
        }
        return machine_provenance() | self.setup.told_model() | named | await chain_provenance(self.client)


@contextlib.asynccontextmanager
async def bench_swarm(
    setup: BenchSetup, *, link: str | None = None, nodes: int | None = None, **client: Any
) -> AsyncIterator[Bench]:
    """Start the nodes unless they run already, connect a client, stop the nodes.  `link` shapes what client and nodes
    of our own send.  Prompts are sent again and again, and each time as if it were the first."""
    async with contextlib.AsyncExitStack() as stack:
        swarm = LocalSwarm()
        if setup.peers is None:
            spans = even_cuts(read_shape(resolve_model(setup.model)).blocks, nodes or setup.nodes)
            flags = ("--quantization", setup.quantization) if setup.quantization else ()
            started = local_swarm(
                setup.model, spans, dtype=setup.dtype, emulate_link=link, swarm_key=setup.swarm_key, flags=flags
            )
            swarm = await stack.enter_async_context(started)
        options = {"draft": setup.draft, "emulate_link": link, "swarm_key": setup.key, "prefix_scope": "none"} | client
        connecting = BenchClient(model=setup.model, peers=setup.peers or swarm.peers, **options)
        yield Bench(setup, swarm, await stack.enter_async_context(connecting), link)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles: these machines are noisy, and one number hides it."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]} if values else {}
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}
