"""What a client has once it is open: the model's files, drafters, a transport; and the search for its target."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from treeswarm.errors import MissingBlocks, NodeLost, RouteError, SwarmError, Unreachable
from treeswarm.grammar.loading import GrammarLoader
from treeswarm.identity import config_digest
from treeswarm.model_files import ModelShape, read_config, read_generation_defaults, read_shape, resolve_model
from treeswarm.model_sources.generation_config import GenerationDefaults
from treeswarm.registry import Registry, client_registry, peers_registry, registry_kind
from treeswarm.registry.diagnosis import explain_no_nodes
from treeswarm.registry.seam import Snapshot
from treeswarm.tasks import cancelled
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.seam import Transport
from treeswarm.transport.tls import Security
from treeswarm_client.chain.wait_events import OnWait, WaitEvents
from treeswarm_client.client_settings import ConnectionSettings, DraftSettings, NodeSelection
from treeswarm_client.discovery.overview import ModelFilter
from treeswarm_client.discovery.prober import Prober
from treeswarm_client.discovery.route import Target
from treeswarm_client.discovery.target import choose_target
from treeswarm_client.drafters import choose_drafter, choose_without_model
from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.drafters.selection.automatic import DraftChoice, TailOffer
from treeswarm_client.generation.drafter_pool import DrafterPool
from treeswarm_client.prompt_encoder import PromptEncoder, load_prompt_encoder

# Records take one poll of the DHT, three seconds, from node to node.
FIRST_TARGET_S = 5.0
LOOK_AGAIN_S = 0.2
# A client that finds its nodes within this time tells nobody that it waited.
QUIET_S = 1.0
# A node on the same continent has answered or refused by then.
HEAD_START_S = 0.5

Found = TypeVar("Found")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True, eq=False)
class OpenedClient:
    """The resources of an open client."""

    folder: Path
    """Directory of the model's config and tokenizer."""
    shape: ModelShape
    config: str
    """Digest of the model's config."""
    prompts: PromptEncoder
    defaults: GenerationDefaults
    """The sampling that the model's publisher recommends."""
    transport: Transport
    grammars: GrammarLoader
    """The compiler of grammars, loaded when it is first needed."""

    @classmethod
    def load(cls, nodes: NodeSelection, connection: ConnectionSettings) -> "OpenedClient":
        """Read the model's files and create the transport.  Blocks for as long as that takes.

        Raises ModelError or BadRequest.
        """
        folder = resolve_model(nodes.model, hub=nodes.hub)
        transport = connection.transport or _grpc_transport(connection)
        if connection.emulate_link:
            transport = EmulatedTransport(transport, LinkShape.parse(connection.emulate_link))
        shape = read_shape(folder)
        return cls(
            folder,
            shape,
            config_digest(read_config(folder)),
            load_prompt_encoder(nodes.model, folder, shape.max_positions),
            read_generation_defaults(folder),
            transport,
            GrammarLoader(folder, shape.vocab_size),
        )

    def model_filter(self, name: str) -> ModelFilter:
        """Return the filter that shows this model alone in an overview, under `name`."""
        return ModelFilter(name, self.config, self.shape.blocks)

    async def find_registry(self, nodes: NodeSelection, waiting: "OpeningWait") -> Registry:
        """Open the registry that names the nodes.  While no address answers, try again until the wait ends.

        Raises Unreachable that names the addresses, RecordsRejected, WrongClock, and what opening a registry raises.
        """
        # Records of other models are refused, except for nodes named one by one: the user must see why those fail.
        model = None if nodes.are_named else self.config
        with waiting.events.ending_on_exit():
            while True:
                try:
                    return await client_registry(nodes.registry_spec, model, self.transport)
                except (Unreachable, NodeLost) as error:
                    await waiting.pause(error)

    async def first_target(
        self, registry: Registry, nodes: NodeSelection, waiting: "OpeningWait"
    ) -> tuple[Target, Snapshot]:
        """Return the target and the records it was chosen from.  Raises RouteError, Mismatch or MissingBlocks.

        Nodes may be about to serve, or their records on the way: the search is repeated until the wait ends while
        blocks are missing, and for up to 5 s where another problem stands in the way.
        """
        start = asyncio.get_running_loop().time()
        with waiting.events.ending_on_exit():
            while True:
                snapshot = await registry.snapshot()
                try:
                    target = choose_target(
                        snapshot,
                        self.config,
                        self.shape,
                        dtype=nodes.dtype,
                        quantization=nodes.quantization,
                        unanswered=registry.report().unanswered,
                    )
                    return target, snapshot
                except RouteError as error:
                    problem = error if snapshot else explain_no_nodes(registry.report())
                    waits = isinstance(problem, MissingBlocks) or (
                        not nodes.are_named and asyncio.get_running_loop().time() < start + FIRST_TARGET_S
                    )
                    if not waits:
                        raise problem from None
                await waiting.pause(problem)


@contextlib.asynccontextmanager
async def open_lookout(nodes: NodeSelection, connection: ConnectionSettings) -> AsyncIterator[Prober]:
    """Yield a prober of the swarm, which shows nodes and gaps while no client can be opened.

    Addresses that do not answer are asked again and again.  Raises ModelError, BadRequest, and Unreachable where a
    broker does not answer.
    """
    folder = await asyncio.to_thread(resolve_model, nodes.model, hub=nodes.hub)
    shape, digest = read_shape(folder), config_digest(read_config(folder))
    transport = connection.transport or _grpc_transport(connection)
    async with contextlib.AsyncExitStack() as stack:
        if connection.transport is None:
            stack.push_async_callback(transport.close)
        spec = nodes.registry_spec
        registry: Registry
        if registry_kind(spec) in ("peers", "static"):
            registry = peers = peers_registry(spec, transport, digest)
            peers.begin()
        else:
            registry = await client_registry(spec, digest, transport)
        stack.push_async_callback(registry.close)
        yield Prober(registry, transport, ModelFilter(nodes.model, digest, shape.blocks))


@dataclass(eq=False)
class OpeningWait:
    """The wait of a client that opens, for nodes to answer and to serve all blocks."""

    patience_s: float
    on_wait: OnWait
    events: WaitEvents = field(init=False)
    _until: float = field(init=False)

    def __post_init__(self) -> None:
        self.events = WaitEvents(b"", self.on_wait)
        self._until = asyncio.get_running_loop().time() + self.patience_s

    async def pause(self, reason: SwarmError) -> None:
        """Report why the client waits, and wait for a moment.  Raises `reason` once the patience has ended."""
        remaining_s = self._until - asyncio.get_running_loop().time()
        if remaining_s <= 0:
            raise reason
        if remaining_s < self.patience_s - QUIET_S:  # records that are a moment late are not worth a line
            self.events.report(reason, remaining_s)
        await asyncio.sleep(min(LOOK_AGAIN_S, remaining_s))


@dataclass(frozen=True, eq=False)
class LoadedDrafters:
    """The drafters of a client, and which they are."""

    pool: DrafterPool
    choice: DraftChoice

    @classmethod
    def load(
        cls, nodes: NodeSelection, drafting: DraftSettings, folder: Path, offer: TailOffer | None
    ) -> "LoadedDrafters":
        """Load the drafter for the target in `folder`.  Blocks for as long as that takes: torch alone takes seconds.

        `offer` is what the chain's tail has to propose with.  Raises ModelError, BadRequest or Mismatch.
        """
        drafter, choice = _load_drafter(nodes, drafting, folder, offer)
        return cls(DrafterPool(drafter, drafting.concurrency), choice)


async def load_beside(search: Coroutine[Any, Any, Found], load: Callable[[], Loaded]) -> tuple[Found, Loaded]:
    """Search for the swarm, and load beside it in a thread; return the results of both, or raise the first error.

    The search has a head start: most errors of addresses and keys come at once, and then nothing is loaded in vain.
    """
    searching = asyncio.ensure_future(search)
    try:
        await asyncio.wait({searching}, timeout=HEAD_START_S)
        if searching.done():
            searching.result()
        loading = asyncio.ensure_future(asyncio.to_thread(load))
        loading.add_done_callback(_retrieve)
        await asyncio.wait({searching, loading}, return_when=asyncio.FIRST_EXCEPTION)
        if loading.done():
            loading.result()  # the error that waiting for nodes cannot mend comes first
        return await searching, await loading
    finally:
        await cancelled(searching)


def _retrieve(loading: "asyncio.Future[Any]") -> None:
    """Look at the error of a load whose result is no longer needed, so that asyncio does not report it."""
    if not loading.cancelled():
        loading.exception()


def _load_drafter(
    nodes: NodeSelection, drafting: DraftSettings, folder: Path, offer: TailOffer | None
) -> tuple[Drafter, DraftChoice]:
    if drafting.drafter is not None:
        return drafting.drafter, DraftChoice(drafting.drafter.name, "as given")
    if drafting.tree_size == 0:
        return NoneDrafter(), DraftChoice("none", "because a tree size of 0 is plain decoding")
    if drafting.draft == "auto" and not drafting.loads_models:
        return choose_without_model("a node drives the texts", offer)
    hub = nodes.hub.for_another_model()
    return choose_drafter(drafting.draft, folder, nodes.model, drafting.device, hub=hub, offer=offer)


def _grpc_transport(connection: ConnectionSettings) -> Transport:
    # Imported here, so that a wrong request is refused before gRPC is loaded.
    from treeswarm.transport.grpc import GrpcTransport  # noqa: PLC0415

    return GrpcTransport(security=Security(swarm_key=connection.swarm_key))
