"""The settings of a client, in groups that are read once."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from treeswarm.errors import BadRequest
from treeswarm.model_files import HubOptions
from treeswarm.protocol.prefix import SCOPE_BYTES
from treeswarm.registry import registry_kind
from treeswarm.transport.seam import Transport
from treeswarm_client.chain.shared_prompt import PrefixScope, check_scope
from treeswarm_client.chain.wait_events import OnWait
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.generation.drafter_pool import MOST_GENERATIONS
from treeswarm_client.generation.run import TreeSize
from treeswarm_client.planner.policy import LARGEST

LARGEST_TREE = 2048
# Number of digits of a node's id that name it: tables show so many.
LEAST_ID = 8
# A volunteer who restarts a node, or another one who joins, takes about so long to serve.
DEFAULT_PATIENCE_S = 30.0
DEFAULT_HUB = HubOptions()


@dataclass(frozen=True)
class NodeSelection:
    """The model, and the nodes that may serve it."""

    model: str
    """Directory, GGUF file, hub id, `smollm2` or `demo`."""
    peers: str | None = None
    """Addresses of the nodes, separated by commas, or None if a registry names them."""
    registry: str | None = None
    """Specification of a registry, or None if the nodes are given."""
    dtype: str | None = None
    """Dtype in which nodes must compute, or None for any."""
    quantization: str | None = None
    """Quantization that nodes' weights must have, or None for any."""
    hub: HubOptions = DEFAULT_HUB
    """Where and how a model named by a hub id is found."""

    @property
    def registry_spec(self) -> str:
        """Specification of the registry that is used.  Raises BadRequest unless exactly one is given."""
        return registry_spec(self.peers, self.registry)

    @property
    def are_named(self) -> bool:
        """Whether the user named the nodes one by one."""
        return registry_kind(self.registry_spec) == "static"


@dataclass(frozen=True)
class DraftSettings:
    """How trees are drafted, and by how many generations at once."""

    draft: str = "auto"
    tree_size: TreeSize = "auto"
    device: str = "auto"
    drafter: Drafter | None = None
    """Drafter to use instead of the one that `draft` names."""
    concurrency: int = MOST_GENERATIONS
    """Number of generations that may run at once."""
    loads_models: bool = True
    """Whether `auto` may load a draft model."""

    def without_model(self) -> "DraftSettings":
        """Return these settings for a client that has a driver: it loads no draft model that the user did not name."""
        return replace(self, loads_models=False)

    def check(self) -> None:
        """Raise BadRequest for a tree size or a concurrency out of range."""
        largest_tree(self.tree_size)
        if self.concurrency < 1:
            raise BadRequest(f"concurrency is {self.concurrency}: give at least 1")


@dataclass(frozen=True)
class ConnectionSettings:
    """How nodes are reached."""

    transport: Transport | None = None
    """Transport to use instead of gRPC with TLS; it is not closed with the client."""
    swarm_key: bytes | None = field(default=None, repr=False)
    """Key of a private swarm, or None."""
    emulate_link: str | None = None
    """Link to emulate, as text, or None."""


@dataclass(frozen=True)
class SessionSettings:
    """What holds for each session of the client."""

    patience_s: float = DEFAULT_PATIENCE_S
    """Seconds to wait for nodes to appear when no chain can be formed."""
    opening_patience_s: float = DEFAULT_PATIENCE_S
    """Seconds that an opening client waits for nodes to answer and to serve all blocks."""
    on_wait: OnWait = lambda _: None
    prefix_scope: PrefixScope = "client"
    prefix_secret: bytes = field(default_factory=lambda: secrets.token_bytes(SCOPE_BYTES), repr=False)
    """Secret that keys the prefixes of this client.  A program that knows it could share them."""
    clock: Callable[[], float] = time.perf_counter
    """Clock in seconds from which a generation's times are read."""
    drive: str = "auto"
    """Where the generation loop runs: `auto`, `self`, or the id or address of a node."""

    @property
    def is_driven_by_name(self) -> bool:
        """Whether the user named a node that drives."""
        return self.drive not in ("auto", "self")

    def check(self) -> None:
        """Raise BadRequest for an unknown prefix scope, or a driver that is no name of a node."""
        check_scope(self.prefix_scope)
        check_drive(self.drive)


def check_drive(drive: str) -> None:
    """Raise BadRequest unless `drive` is `auto`, `self`, an address, or the beginning of a node's id."""
    is_id = LEAST_ID <= len(drive) <= 32 and all(digit in "0123456789abcdef" for digit in drive)
    if drive not in ("auto", "self") and not is_id and ":" not in drive:
        raise BadRequest(
            f"unknown driver '{drive}': give auto, self, or a node by its HOST:PORT or at least {LEAST_ID} digits of "
            "its id"
        )


def largest_tree(tree_size: TreeSize) -> int:
    """Return the largest number of nodes of a tree.  Raises BadRequest."""
    if tree_size == "auto":
        return LARGEST
    if not isinstance(tree_size, int) or not 0 <= tree_size <= LARGEST_TREE:
        raise BadRequest(
            f"tree size {tree_size} is out of range: give auto, 0 (plain decoding), or up to {LARGEST_TREE}"
        )
    return tree_size


def registry_spec(peers: str | None, registry: str | None) -> str:
    """Return the specification of the registry: `--peers` is short for `--registry static:…`.

    Raises BadRequest unless exactly one of the two is given.
    """
    if (peers is None) == (registry is None):
        raise BadRequest(
            "the nodes are not given: use either --registry CODE, the join code of any node, or "
            "--peers HOST:PORT,HOST:PORT"
        )
    return registry if registry is not None else f"static:{peers}"
