"""What a client has once it is open: the model's files, drafters, a transport; and the search for its target."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from treeswarm.errors import RouteError
from treeswarm.identity import config_digest
from treeswarm.model_files import ModelShape, load_tokenizer, read_config, read_shape, resolve_model
from treeswarm.registry import Registry
from treeswarm.registry.seam import Snapshot
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Transport
from treeswarm.transport.tls import Security
from treeswarm_client.chat_template import load_chat_template
from treeswarm_client.client_settings import ConnectionSettings, DraftSettings, NodeSelection
from treeswarm_client.discovery.overview import ModelFilter
from treeswarm_client.discovery.route import Target
from treeswarm_client.discovery.target import choose_target
from treeswarm_client.drafters import DraftChoice, choose_drafter
from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.generation.drafter_pool import DrafterPool
from treeswarm_client.prompt_encoder import PromptEncoder

# Records take one poll of the DHT, three seconds, from node to node.
FIRST_TARGET_S = 5.0
LOOK_AGAIN_S = 0.2


@dataclass(frozen=True, eq=False)
class OpenedClient:
    """The resources of an open client."""

    folder: Path
    """Directory of the model's config and tokenizer."""
    shape: ModelShape
    config: str
    """Digest of the model's config."""
    prompts: PromptEncoder
    drafters: DrafterPool
    draft: DraftChoice
    transport: Transport

    @classmethod
    def load(cls, nodes: NodeSelection, drafting: DraftSettings, connection: ConnectionSettings) -> "OpenedClient":
        """Read the model's files, load the drafter and create the transport.  Blocks for as long as that takes.

        Raises ModelError or BadRequest.
        """
        folder = resolve_model(nodes.model, hub=nodes.hub)
        drafter, draft = _load_drafter(nodes, drafting, folder)
        transport = connection.transport or GrpcTransport(security=Security(swarm_key=connection.swarm_key))
        if connection.emulate_link:
            transport = EmulatedTransport(transport, LinkShape.parse(connection.emulate_link))
        return cls(
            folder,
            read_shape(folder),
            config_digest(read_config(folder)),
            PromptEncoder(nodes.model, load_tokenizer(folder), load_chat_template(folder)),
            DrafterPool(drafter, drafting.concurrency),
            draft,
            transport,
        )

    def model_filter(self, name: str) -> ModelFilter:
        """Return the filter that shows this model alone in an overview, under `name`."""
        return ModelFilter(name, self.config, self.shape.blocks)

    async def first_target(
        self, registry: Registry, nodes: NodeSelection, patience_s: float
    ) -> tuple[Target, Snapshot]:
        """Return the target and the records it was chosen from.  Raises RouteError, Mismatch or MissingBlocks.

        Nodes may be about to serve, or their records on the way: the search is repeated for up to 5 s, within the
        patience.  Nodes that the user named one by one have been asked already, so there is no second search.
        """
        end = asyncio.get_running_loop().time() + (0.0 if nodes.are_named else min(patience_s, FIRST_TARGET_S))
        while True:
            snapshot = await registry.snapshot()
            try:
                target = choose_target(
                    snapshot, self.config, self.shape, dtype=nodes.dtype, quantization=nodes.quantization
                )
                return target, snapshot
            except RouteError:
                if asyncio.get_running_loop().time() > end:
                    raise
            await asyncio.sleep(LOOK_AGAIN_S)


def _load_drafter(nodes: NodeSelection, drafting: DraftSettings, folder: Path) -> tuple[Drafter, DraftChoice]:
    if drafting.drafter is not None:
        return drafting.drafter, DraftChoice(drafting.drafter.name, "as given")
    if drafting.tree_size == 0:
        return NoneDrafter(), DraftChoice("none", "because a tree size of 0 is plain decoding")
    hub = nodes.hub.for_another_model()
    return choose_drafter(drafting.draft, folder, nodes.model, drafting.device, hub=hub)
