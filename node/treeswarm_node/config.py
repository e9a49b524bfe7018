"""The settings of `swarm-node`: every flag is declared here, once, on the field that it sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from treeswarm.errors import BadRequest
from treeswarm.protocol.spans import Span
from treeswarm.transport.emulated import parse_rate
from treeswarm.transport.rate_limit import LEAST_RATE
from treeswarm_node.flags import Flag, parse_size
from treeswarm_node.schedule import Schedule

# With a smaller share a forward would hold up a chain twenty times as long as its neighbours': pausing is the better
# choice for an owner who wants to give less.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class ModelConfig:
    """The model, the blocks to host, and the numbers they are computed in."""

    name: Annotated[str, Flag("model", "model directory, GGUF file, hub id, `smollm2` or `demo`", metavar="MODEL")]
    revision: Annotated[
        str | None,
        Flag("--revision", "branch, tag or commit of a model on the hub (default: the main branch)", metavar="REV"),
    ] = None
    span: Annotated[
        Span | None,
        Flag(
            "--blocks", "decoder blocks to host, such as 0:3 (default: those that help the swarm most)",
            metavar="START:END", read=Span.parse,
        ),
    ] = None  # fmt: skip
    num_blocks: Annotated[
        int | None,
        Flag(
            "--num-blocks", "number of blocks to host if --blocks is not given (default: as many as fit)", metavar="N"
        ),
    ] = None
    dtype: Annotated[
        str,
        Flag(
            "--dtype",
            "number format of weights and activations; auto: that of the swarm that is joined, else the checkpoint's, "
            "or float32 where the device has no arithmetic for it (default: auto)",
            choices=("auto", "float32", "bfloat16", "float16"),
        ),
    ] = "auto"
    quantization: Annotated[
        str,
        Flag(
            "--quantization",
            "quantize the weights of the hosted blocks to 8 bits (int8) or 4 bits (int4 on a CPU, else nf4), or not "
            "(none); published: let a CPU multiply with the integers of 8 or 4 bits in which weights are published "
            "(default: auto, as the swarm that is joined, none in a new one)",
            choices=("auto", "none", "published", "int8", "int4", "nf4"),
        ),
    ] = "auto"  # fmt: skip
    activations: Annotated[
        str,
        Flag(
            "--activations",
            "format of the activations sent between nodes: native as computed, or int8 in 8 bits, which changes the "
            "text (default: auto, as the swarm that is joined, native in a new one)",
            choices=("auto", "native", "int8"), text_default="auto",
            read=lambda text: "" if text == "native" else text,
        ),
    ] = "auto"  # fmt: skip

    speculator: Annotated[
        str,
        Flag(
            "--speculator",
            "guess the next tokens beside the last block: folder that `swarm train-speculator` wrote, published "
            "EAGLE-3 head (its folder or its hub id), mtp (the layer for this in the model's own checkpoint), or none; "
            "auto: the folder `speculator` of the model's directory, the checkpoint's own layer, or a known head, if "
            "it is on this machine (default: auto)",
            metavar="HEAD",
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        if self.num_blocks is not None and self.num_blocks < 1:
            raise BadRequest(f"--num-blocks {self.num_blocks} hosts nothing: give at least 1")


@dataclass(frozen=True)
class DeviceConfig:
    """The device, and how much of it the node may use."""

    name: Annotated[
        str,
        Flag(
            "--device", "device to compute on: auto, cpu, cuda, cuda:1 or mps (default: auto, a GPU if there is one)",
            metavar="DEVICE",
        ),
    ] = "auto"  # fmt: skip
    share: Annotated[
        float,
        Flag(
            "--device-share",
            "use the device at most this share of the time, by resting after each forward (default: 1)",
            metavar="SHARE",
        ),
    ] = 1.0
    memory: Annotated[
        int | None,
        Flag(
            "--memory", "use at most this much memory, such as 6GiB (default: all that is free)",
            metavar="SIZE", read=parse_size,
        ),
    ] = None  # fmt: skip
    offload: Annotated[
        str,
        Flag(
            "--offload",
            "host more blocks than the device holds, by keeping their weights in main memory (ram) or in files (disk) "
            "while they are not computed with (default: none)",
            choices=("none", "ram", "disk"),
        ),
    ] = "none"
    kv_tokens: Annotated[
        int, Flag("--kv-tokens", "number of tokens in the KV cache, for all sessions together (default: 16384)", "N")
    ] = 16384
    threads: Annotated[
        int, Flag("--threads", "number of CPU threads that compute the model (default: torch chooses)", "N")
    ] = 0
    attention: Annotated[
        str,
        Flag(
            "--attention",
            "implementation of attention: torch, or flash, which uses torch's flash kernels for long texts; "
            "auto: flash on CUDA, a fused kernel on CPUs, where their results are right (default: auto)",
            choices=("auto", "torch", "flash"),
        ),
    ] = "auto"
    expand: Annotated[
        str,
        Flag(
            "--expand",
            "when weights that are published in fewer bits become numbers of --dtype: while they are loaded (load), or "
            "one matrix at a time in every forward (use), which holds them in the published bits and takes more time; "
            "auto: load if the blocks fit so (default: auto)",
            choices=("auto", "load", "use"),
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        if not LEAST_SHARE <= self.share <= 1.0:
            raise BadRequest(
                f"--device-share {self.share:g} is not a valid share of the time: give {LEAST_SHARE:g} to 1, or run "
                "`swarm-node pause` to have the device to yourself"
            )
        if self.kv_tokens < 1:
            raise BadRequest(f"--kv-tokens {self.kv_tokens} leaves no room for a session: give a few thousand")
        if self.threads < 0:
            raise BadRequest(f"--threads {self.threads} is not a number of threads: give 1 or more, or 0 for torch's")


@dataclass(frozen=True)
class NetworkConfig:
    """The network: addresses, the swarm to join, keys, and the line."""

    listen: Annotated[
        str, Flag("--listen", "address to listen on (default: all interfaces, a free port)", metavar="HOST:PORT")
    ] = "0.0.0.0:0"
    announce: Annotated[
        str | None,
        Flag(
            "--announce",
            "address at which others reach this node through a router; port 0 means the port listened on "
            "(default: other nodes are asked)",
            metavar="HOST:PORT",
        ),
    ] = None
    registry: Annotated[
        str | None,
        Flag(
            "--registry",
            "swarm to join: the join code that a node prints, HOST:PORT of any node, dht:ADDRESS,…, "
            "mqtts://USER:PASSWORD@HOST/NAMESPACE, or none for no registry (default: the swarm of the last run, or a "
            "new one, in a DHT)",
            metavar="CODE",
        ),
    ] = None
    identity: Annotated[
        Path | None,
        Flag(
            "--identity",
            "file with the keys of this node, created at its first start (default: the first of the user's files "
            "that no running node holds)",
            metavar="PATH",
        ),
    ] = None
    swarm_key: Annotated[
        Path | None, Flag("--swarm-key", "key file of a private swarm (default: an open swarm)", metavar="PATH")
    ] = None
    compression: Annotated[
        str,
        Flag(
            "--compression",
            "lossless compression of rows sent to the next node; auto: of 16-bit values, on lines where it pays "
            "(default: auto)",
            choices=("auto", "none", "lossless"),
        ),
    ] = "auto"
    bandwidth: Annotated[
        float | None,
        Flag(
            "--bandwidth",
            "send at most this many bits per second to nodes and clients together, such as 20mbit (default: no limit)",
            metavar="RATE",
            read=parse_rate,
        ),
    ] = None
    emulate_link: Annotated[
        str | None,
        Flag(
            "--emulate-link", "delay what this node sends, as on a longer line: delay=25ms,rate=100mbit",
            metavar="SHAPE",
        ),
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        if self.bandwidth is not None and self.bandwidth < LEAST_RATE:
            raise BadRequest(
                f"--bandwidth {self.bandwidth / 1000:g}kbit is too little to take part: give 1mbit or more, or use "
                "--hours to serve only while the line is free"
            )


@dataclass(frozen=True)
class LendingConfig:
    """Ports lent to nodes behind routers, which cannot be reached from outside."""

    ports: Annotated[
        int, Flag("--lend-ports", "lend at most this many ports to nodes behind routers; 0: none (default: 4)", "N")
    ] = 4
    first_port: Annotated[
        int,
        Flag(
            "--lend-from",
            "first of the ports to use: borrowers fetch connections at it, and the next ones are lent "
            "(default: any that are free)",
            metavar="PORT",
        ),
    ] = 0
    ports_to_host: int = 2
    """Number of ports lent to one IP address: a household has a few machines, and none may take every port."""
    connections: int = 128
    """Number of connections on one lent port.  Each is two sockets here, and up to 640 KiB of memory while both its
    ends are slow.  A client has two connections on a node, an upstream node one."""
    connections_of_host: int = 64
    """Number of connections of one IP address on one lent port."""
    bytes_per_s: int = 0
    """Bytes per second through one lent port, both directions together; 0: as many as the line takes.  Below some
    100 kB/s gRPC's pings are late, and it drops connections."""

    def __post_init__(self) -> None:
        if self.ports < 0 or not 0 <= self.first_port < 2**16 - max(0, self.ports):
            raise BadRequest(
                f"--lend-ports {self.ports} --lend-from {self.first_port} are not valid: "
                "all lent ports must be below 65536"
            )


MODELLESS_DRAFTS = ("auto", "ngram", "tail", "tail+ngram", "none")
"""Drafters that name no draft model."""


@dataclass(frozen=True)
class DrivingConfig:
    """Texts driven for clients that are far away: the generation loop runs on this node."""

    offered: Annotated[
        bool,
        Flag(
            "--drive",
            "run the generation loop for clients that are farther from the nodes than this one is; they send it their "
            "prompts (default: no)",
            action="store_true",
        ),
    ] = False
    draft: Annotated[
        str,
        Flag(
            "--drive-draft",
            "drafter for the texts driven: auto, ngram, tail, tail+ngram, none, or a draft model (directory, hub id or "
            "`demo-draft`), with or without `+ngram` (default: auto, chosen as a client chooses)",
            metavar="DRAFT",
        ),
    ] = "auto"  # fmt: skip
    texts: Annotated[int, Flag("--max-driven", "number of texts driven at once (default: 8)", "N")] = 8

    def __post_init__(self) -> None:
        if self.texts < 1:
            raise BadRequest(f"--max-driven is {self.texts}: give at least 1, or leave out --drive")

    @property
    def draft_model(self) -> str:
        """Name of the draft model, or "" if none is named."""
        return "" if self.draft in MODELLESS_DRAFTS else self.draft.removesuffix("+ngram")


@dataclass(frozen=True)
class OperationsConfig:
    """When the node serves, and what it shows of itself."""

    hours: Annotated[
        Schedule | None,
        Flag(
            "--hours",
            "serve only at these hours, local time, such as 22:00-07:00, and pause otherwise (default: all day)",
            metavar="HH:MM-HH:MM",
            read=Schedule.parse,
        ),
    ] = None
    metrics: Annotated[
        str | None,
        Flag("--metrics", "serve Prometheus metrics at this address, without a password (default: none)", "HOST:PORT"),
    ] = None
    panel: Annotated[
        bool,
        Flag(
            "--no-panel", "print log lines on a terminal instead of the live panel", action="store_false", dest="panel"
        ),
    ] = True
    qr: Annotated[bool, Flag("--qr", "show the join code as a QR code too", action="store_true")] = False
    log_json: Annotated[
        bool,
        Flag(
            "--log-format", "format of the log; json: one object per line (default: text)",
            choices=("text", "json"), text_default="text", read=lambda text: text == "json",
        ),
    ] = False  # fmt: skip
    verbose: Annotated[bool, Flag("--verbose", "log every session", action="store_true")] = False


@dataclass(frozen=True)
class BatchBudget:
    """Rows of one forward.  A single step larger than the budget still runs, alone."""

    rows: int
    """Number of rows in all."""
    prefill_rows: int
    """Number of rows that may belong to prompts."""


@dataclass(frozen=True)
class NodeLimits:
    """Limits on what the node grants.

    Every number bounds memory or time that a peer could otherwise take without limit.
    """

    sessions: Annotated[
        int, Flag("--max-sessions", "number of sessions that may be open at once (default: 256)", "N")
    ] = 256
    drain_grace_s: Annotated[
        float,
        Flag("--grace", "seconds that sessions have to move elsewhere when the node leaves (default: 30)", "SECONDS"),
    ] = 30.0
    sessions_per_host: int = 128
    """Number of sessions of one IP address: several users may share one, and none may take everything.  All clients
    that come through a borrowed port seem to come from this machine and share one such number; there the port lender
    sees to it that no host takes all connections."""
    streams: int = 4096
    """Number of control and link streams open at once."""
    credit_rows: int = 4096
    """Number of rows in flight per session, at least: 64 MiB of activations at hidden size 8192 in 16 bits."""
    session_grace_s: float = 30.0
    """Seconds that a session lives on after its client's control stream broke."""
    idle_s: float = 600.0
    """Seconds after which a session without requests is closed, so that its room is free for others."""
    replay_log_bytes: int = 1 << 30
    """Bytes of host memory for all replay logs.  Two sessions of 32k tokens at hidden size 8192 in 16 bits fill it.
    A session without a log is replayed from further upstream."""
    hello_s: float = 10.0
    """Seconds after which a new link that has sent nothing is closed."""
    budget: BatchBudget = BatchBudget(rows=2048, prefill_rows=512)
    """Number of rows in one forward.  Past a few hundred rows a forward's time grows with its rows, so that larger
    batches gain no throughput and cost every session in them latency (docs/decisions/)."""


@dataclass(frozen=True)
class AutomaticChoices:
    """Why the node chose what the owner left to `auto`; empty where the owner chose."""

    device: str = ""
    numerics: str = ""


@dataclass(frozen=True)
class NodeConfig:
    """All settings of a node: flags, variables and config file, read once at start."""

    model: ModelConfig
    device: DeviceConfig = DeviceConfig()
    network: NetworkConfig = NetworkConfig()
    lending: LendingConfig = LendingConfig()
    driving: DrivingConfig = DrivingConfig()
    operations: OperationsConfig = OperationsConfig()
    limits: NodeLimits = NodeLimits()
    automatic: AutomaticChoices = AutomaticChoices()

    @property
    def may_move(self) -> bool:
        """Whether the node chooses its blocks itself, and may move to others."""
        return self.model.span is None
