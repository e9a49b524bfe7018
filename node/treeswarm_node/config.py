"""What a node is told at start, read once at the edge."""

from dataclasses import dataclass
from pathlib import Path

from treeswarm.errors import BadRequest
from treeswarm.protocol.spans import Span
from treeswarm.transport.rate_limit import LEAST_RATE
from treeswarm_node.schedule import Schedule

# Below it a forward would hold up a chain twenty times as long as its neighbours': whoever wants to give less pauses.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class BatchBudget:
    """Rows of one forward.  A single step larger than the budget still runs, alone."""

    rows: int
    prefill_rows: int


@dataclass(frozen=True)
class NodeLimits:
    """What one node grants.  Every number bounds memory or time that a stranger could otherwise take."""

    sessions: int = 256
    """Open at once."""
    sessions_per_host: int = 128
    """Of one IP address: several users may share one, none may take everything.  Whoever comes through a rented port
    seems to come from this machine: they share one such number, and it is the landlord who sees that no host takes
    all of that port's connections."""
    streams: int = 4096
    """Control and link streams at once."""
    credit_rows: int = 4096
    """Rows in flight per session, at least: 64 MiB of activations at hidden size 8192 in 16 bits."""
    lease_s: float = 30.0
    """A session whose client's control stream broke lives this long."""
    idle_s: float = 600.0
    """A session that asks for nothing for so long gives its room to others."""
    journal_bytes: int = 1 << 30
    """Host memory for all journals.  Two sessions of 32k tokens at hidden size 8192 in 16 bits fill it; a session
    without one is replayed from further upstream."""
    grace_s: float = 30.0
    """A draining node waits so long for its sessions to move elsewhere."""
    hello_s: float = 10.0
    """A link that says nothing for so long after it was opened is closed."""
    lend_ports: int = 4
    """Nodes behind routers that may rent a port here; 0: none."""
    lend_ports_to_host: int = 2
    """To one IP address: a household has some machines, none may take everything."""
    lend_connections: int = 128
    """On one lent port.  Each is two sockets here, and up to 640 KiB of memory while both its ends are slow; a client
    has two on a node, an upstream node one."""
    lend_connections_of_host: int = 64
    """Of one IP address on one lent port."""
    lend_bytes_per_s: int = 0
    """Through one lent port, both ways together; 0: as the line takes it.  Below some 100 kB/s gRPC's pings are late,
    and it drops connections."""
    budget: BatchBudget = BatchBudget(rows=2048, prefill_rows=512)
    """Rows of one forward: past some hundred rows a forward's time grows with its rows, so larger batches
    buy no throughput and cost everyone in them latency (docs/log.md)."""


@dataclass(frozen=True)
class NodeConfig:
    """`swarm-node`'s command line, parsed."""

    model: str
    span: Span | None
    """None: those that help the swarm most."""
    listen: str
    dtype: str
    device: str
    kv_tokens: int
    threads: int
    emulate_link: str | None
    log_json: bool
    identity: Path | None = None
    """None: the user's first that no running node holds."""
    swarm_key: Path | None = None
    """None: an open swarm."""
    registry: str | None = None
    """Where the node announces itself; None: a new swarm in a DHT of its own."""
    announce: str | None = None
    """`HOST:PORT` where others reach it, if not where it listens; port 0 is the one listened on."""
    lend_from: int = 0
    """The first of the ports lent to others, where they fetch; the next ones are theirs.  0: any that are free."""
    num_blocks: int | None = None
    """How many blocks to host where `span` is None; None: as many as fit."""
    memory: int | None = None
    """Bytes to use; None: what is free."""
    device_share: float = 1.0
    """Of the time, at most: after each forward the device rests."""
    quantization: str = "none"
    """Of the hosted blocks' weights: `none`, `int8`, `nf4`."""
    activations: str = ""
    """On links: empty as computed, or `int8`."""
    compression: str = "auto"
    """Of rows to the next node, losing nothing: `none`, `lossless`, or `auto`, where it pays."""
    attention: str = "auto"
    """How it is computed: `torch`, `flash`, or `auto`, which is flash on CUDA where that passes its proof."""
    offload: str = "none"
    """Where the blocks' weights stay while they are not computed with: `none`, `ram`, `disk`."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; None: the default branch."""
    metrics: str | None = None
    """`HOST:PORT` where Prometheus is answered; None: nowhere."""
    bandwidth: float | None = None
    """Bits a second to send, to nodes and clients together; None: as the line takes it."""
    hours: Schedule | None = None
    """When to serve; None: always."""
    panel: bool = True
    """On a terminal, a live picture of the node."""
    limits: NodeLimits = NodeLimits()

    def __post_init__(self) -> None:
        if not LEAST_SHARE <= self.device_share <= 1.0:
            raise BadRequest(
                f"--device-share {self.device_share:g} is no share of the time: give {LEAST_SHARE:g} to 1, or "
                "`swarm-node pause` to have the device alone"
            )
        if self.bandwidth is not None and self.bandwidth < LEAST_RATE:
            raise BadRequest(
                f"--bandwidth {self.bandwidth / 1000:g}kbit is too little to take part: give 1mbit or more, or "
                "say with --hours when the line is free"
            )
