"""What all benches share: a swarm of processes with a client, and the provenance of the figures."""

import contextlib
import statistics
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeswarm.keys import read_swarm_key
from treeswarm.model_files import read_shape, resolve_model
from treeswarm_bench.bench_client import BenchClient
from treeswarm_bench.benchmarks.widened_model import WidenedModel
from treeswarm_client.generation.run import Run, TreeSize
from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm
from treeswarm_client.provenance import chain_provenance, machine_provenance

# Bytes per number, as nodes keep it.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class BenchSetup:
    """The settings of `swarm bench` that several benches use."""

    model: str = "demo"
    draft: str = "demo-draft"
    dtype: str = "float32"
    nodes: int = 3
    """Number of nodes that the bench starts."""
    prompts: int = 8
    """Number of prompts."""
    tokens: int = 64
    """Number of tokens to generate for each prompt."""
    swarm_key: Path | None = None
    """Key file of a private swarm, or None for an open one."""
    prompt_tokens: int | None = None
    """Number of tokens to cut the prompts to, or None for all."""
    peers: str | None = None
    """Addresses of nodes that run already, or None if the bench starts its own on this machine."""
    quantization: str | None = None
    """Format of the weights of nodes that the bench starts, or None for weights as they are."""
    speculator: str = "auto"
    """Speculator of the tail, as `swarm-node --speculator` takes it."""
    widened: WidenedModel | None = None
    """The wider copy that `model` names, or None if `model` is the original."""

    @property
    def key(self) -> bytes | None:
        """Key of the private swarm, or None.  Raises BadRequest if its file cannot be read."""
        return read_swarm_key(self.swarm_key) if self.swarm_key else None

    def model_provenance(self) -> dict[str, Any]:
        """Return the model as the user named it, and how much wider it was made."""
        if self.widened is None:
            return {"model": self.model}
        mib = self.widened.block_weights * BYTES[self.dtype] / 2**20
        return {"model": self.widened.of, "widen": self.widened.times, "block_weights_mib": mib}


@dataclass(frozen=True)
class BenchSwarm:
    """A running swarm and a client of it."""

    setup: BenchSetup
    swarm: LocalSwarm
    """The nodes that the bench started; none if they were running already."""
    client: BenchClient
    link: str | None
    """Shape of the emulated links, or None for none."""

    @property
    def addresses(self) -> list[str]:
        """Addresses of the nodes, in the order of their blocks."""
        return self.client.addresses

    async def run(
        self, prompt: Sequence[int], *, tree_size: TreeSize, tokens: int | None = None, **sampling: Any
    ) -> Run:
        """Run one whole generation, which no stop token ends.

        Raises the error that ended it: figures of a swarm with a dead node mean nothing.
        """
        return await self.client.generate(
            prompt, max_new_tokens=tokens or self.setup.tokens, tree_size=tree_size, ignore_eos=True, **sampling
        )

    async def provenance(self) -> dict[str, Any]:
        """Return versions, weights, links, and what each node computed.  Raises SwarmError if a node is gone."""
        settings = {
            "draft": self.setup.draft,
            "quantization": self.setup.quantization or "none",
            "link": self.link or ("as it is" if self.setup.peers else "loopback"),
        }
        return machine_provenance() | self.setup.model_provenance() | settings | await chain_provenance(self.client)


@contextlib.asynccontextmanager
async def bench_swarm(
    setup: BenchSetup, *, link: str | None = None, nodes: int | None = None, **client: Any
) -> AsyncIterator[BenchSwarm]:
    """Start the nodes unless they run already, connect a client, and stop the nodes on leaving.

    `link` shapes what the client, and nodes that the bench starts, send.  The client shares no prefixes: prompts are
    sent again and again, and each time the nodes compute the whole prompt.
    """
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
        yield BenchSwarm(setup, swarm, await stack.enter_async_context(connecting), link)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles, or nothing for no values: these machines are noisy, and one number would hide it."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]} if values else {}
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50 and p95 by nearest rank, or nothing for no values."""
    ranked = sorted(values)
    return {f"p{p}": ranked[min(len(ranked) - 1, int(len(ranked) * p / 100))] for p in (50, 95)} if ranked else {}
