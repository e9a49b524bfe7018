"""What client and nodes say to each other, as plain frozen data.

`wire/codec.py` turns these into the protobuf of `proto/treeswarm.proto` and back, and checks every
field against the limits below; behind it a message can be trusted to be well-formed, not to be
true.  Arrays are NumPy, read-only, and one-dimensional but for `Answer.alternatives`.

Two kinds of stream carry them:

    control  client → node: Describe, Open, Resume, Hint, Ping, Close; Watch, DialBack, Manage, LeasePort
             node → client: Description, Opened, Answer (from the tail), Pong, Fault; Records, DialledBack, Managed,
             PortLeased, IncomingConnection
    link     upstream → downstream: LinkHello once, then Append after Append (the client is the head's
             upstream)
             downstream → upstream: LinkWelcome once where the hello asked for it, then nothing but the stream's end
"""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.prefix import Prefix
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span

# One append is at most this many bytes of activations, so that a stage computes while the next
# segment uploads; a client cuts larger trees and prompts into several appends.
SEGMENT_BYTES = 1 << 20
# Above any segment with its ids, timings and headers; gRPC refuses larger frames before parsing.
MAX_MESSAGE_BYTES = 4 << 20
MAX_ROWS = 4096
# Values that share a scale in 8-bit activations: a scale costs 3 % of the bytes, and an outlier spoils 63 others.
ACTIVATION_BLOCK = 64
MAX_CROWN = 4096
MAX_TRUNK = 1 << 22
MAX_HOPS = 256
MAX_TEXT = 4096
MAX_RECORD_BYTES = 600
MAX_RECORDS = 4096
SIGNATURE_BYTES = 64
SESSION_ID_BYTES = 16
TICKET_BYTES = 16
MAX_PROFILE_POINTS = 16
# Longer than any forward that a client would wait for.
MAX_PROFILE_US = 3_600_000_000
# Token Recycling keeps eight successors of a token; more never paid there.
MAX_ALTERNATIVES = 8

Ids = NDArray[np.uint32]
Profile = tuple[tuple[int, int], ...]
"""How long a node's forward takes: (rows, microseconds), rows rising; empty where the node tells nothing."""


def no_alternatives() -> Ids:
    """Of an answer that was asked for none."""
    return np.empty((0, 0), np.uint32)


class Answers(StrEnum):
    """For which rows of an append the tail computes the target's token."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


class FaultCode(StrEnum):
    """Why a node said no."""

    MALFORMED = "malformed"
    UNKNOWN_SESSION = "unknown-session"
    WRONG_TICKET = "wrong-ticket"
    WRONG_SWARM_KEY = "wrong-swarm-key"
    WRONG_VERSION = "wrong-version"
    MISMATCH = "mismatch"
    FULL = "full"
    OUT_OF_ROOM = "out-of-room"
    OUT_OF_CREDIT = "out-of-credit"
    BAD_TREE = "bad-tree"
    REPLAYED = "replayed"
    NOT_FINITE = "not-finite"
    DOWNSTREAM = "downstream"
    DRAINING = "draining"
    NO_JOURNAL = "no-journal"
    EXPIRED = "expired"
    TOO_MANY = "too-many"
    INTERNAL = "internal"
    REFUSED = "refused"


@dataclass(frozen=True)
class NumericsClass:
    """Nodes of one route share all of it; mixing changes the text."""

    weights: str
    """Hex digest of the model's config and every weight file."""
    dtype: str
    """`float32`, `bfloat16` or `float16`: of weights, KV cache and activations on the wire."""
    quantization: str = "none"
    """Of the weights: `none`, `int8` or `nf4`."""
    activations: str = ""
    """How rows travel between nodes: empty in `dtype`, or `int8`, which changes the text."""

    def row_bytes(self, hidden_size: int) -> int:
        """Of one row of activations on a link."""
        if self.activations == "int8":
            return hidden_size + 2 * -(-hidden_size // ACTIVATION_BLOCK)
        return hidden_size * (4 if self.dtype == "float32" else 2)

    @property
    def plain(self) -> bool:
        """Neither weights nor activations lose anything to fewer bits than `dtype` has."""
        return self.quantization in {"", "none"} and not self.activations

    def difference(self, other: "NumericsClass") -> str:
        """Name the first thing in which `other`, which is not equal, differs from this class."""
        if self.weights != other.weights:
            return f"their weights differ ({self.weights[:12]} and {other.weights[:12]})"
        if self.dtype != other.dtype:
            return f"they compute in {self.dtype} and {other.dtype}"
        if self.quantization != other.quantization:
            return f"their quantization differs ({self.quantization} and {other.quantization})"
        return f"their activations differ ({self.activations or 'native'} and {other.activations or 'native'})"

    def __str__(self) -> str:
        """Describe the class for people; weights are named by the first digits of their digest."""
        quantization = f", {self.quantization} weights" if self.quantization not in ("", "none") else ""
        activations = f", {self.activations} activations" if self.activations else ""
        return f"{self.dtype}{quantization}{activations} ({self.weights[:12]})"


@dataclass(frozen=True)
class HopTiming:
    """What one node did with one append, in microseconds of its own clock."""

    queue_us: int
    """From arrival to the start of its forward."""
    compute_us: int
    """In the device thread, of the forward it was part of."""
    rows: int
    """Rows of this append the node computed."""
    batch_sessions: int
    """Sessions in that forward."""


# ---------------------------------------------------------------- control, client to node


@dataclass(frozen=True)
class Describe:
    """Ask what a node serves."""

    version: int


@dataclass(frozen=True)
class NextHop:
    """Where a node sends its activations, and the ticket that link accepts."""

    address: str
    ticket: bytes


@dataclass(frozen=True)
class Resumption:
    """Where a session goes on after a loss: the text that every survivor is sure to have."""

    trunk_length: int
    tip: int
    """What the client calls the last token of it: an id never used before."""


@dataclass(frozen=True)
class Open:
    """Reserve a session.  Every node of the route gets its own."""

    version: int
    session: bytes
    epoch: int
    span: Span
    numerics: NumericsClass
    trunk_room: int
    """Committed tokens the session may reach: prompt and answer."""
    crown_room: int
    """Speculated rows alive at once."""
    ticket: bytes
    """What the upstream link must show."""
    next_hop: NextHop | None
    """None: this node is the tail."""
    resumption: Resumption | None = None
    """This node replaces a lost one: replayed rows come first."""
    forwards_replay: bool = False
    """The next hop is a replacement too."""
    prefix: Prefix | None = None
    """KV of this prompt may be shared; None: it may not."""
    alternatives: int = 0
    """For the tail: how many of the target's best tokens to send with every answered row."""


@dataclass(frozen=True)
class Resume:
    """To a node that stays when others were lost: cut the trunk back, drop the crown, go on in a new epoch."""

    version: int
    session: bytes
    epoch: int
    resumption: Resumption
    ticket: bytes
    next_hop: NextHop | None
    replays: bool
    """The next hop is new: send it the journal first."""


@dataclass(frozen=True)
class Hint:
    """The client knows more than the ring yet: nodes not below this tip are dead.  Changes no state."""

    session: bytes
    trunk_length: int
    """After `tip` has joined the trunk."""
    tip: int


@dataclass(frozen=True)
class Ping:
    """Liveness; `stamp` comes back untouched."""

    stamp: int
    session: bytes = b""
    """Whose progress the Pong tells; empty: nobody's."""


@dataclass(frozen=True)
class Close:
    """Free the session now."""

    session: bytes


@dataclass(frozen=True)
class Watch:
    """Ask for signed records: this node's own, or everyone's that it knows, now and as they change."""

    version: int
    everyone: bool


@dataclass(frozen=True)
class DialBack:
    """Ask a node to dial `address`, to learn whether strangers reach it."""

    address: str
    """The asker's own; 0.0.0.0 or [::] for whatever host it is seen to come from."""


@dataclass(frozen=True)
class Manage:
    """An owner's order, signed by the node's own identity: `pause`, `resume` or `drain`."""

    action: str
    stamp: int
    signature: bytes


@dataclass(frozen=True)
class LeasePort:
    """Ask a node for a lease of a port that other machines can dial, in place of the sender's own."""

    version: int


# ---------------------------------------------------------------- control, node to client


@dataclass(frozen=True)
class Description:
    """What a node serves."""

    version: int
    software: str
    span: Span
    blocks: int
    """Decoder blocks of the whole model."""
    vocab_size: int
    hidden_size: int
    max_positions: int
    config: str
    """Hex digest of the numerics-relevant config, which a client without weights can compute too."""
    numerics: NumericsClass
    attention: str
    """The attention adapter in use, such as `torch-reference`."""
    trunk_free: int
    """KV rows not reserved by any session."""
    frames: int
    """Appends computed since start."""
    forwards: int
    forward_sessions: int
    """Sum over forwards of the sessions in each."""
    sessions: int = 0
    """Open now."""
    opened: int = 0
    """Since start, as are the two below."""
    resumed: int = 0
    """Epochs begun in sessions that lost another node."""
    refused: int = 0
    """Sessions refused."""
    prefix_hits: int = 0
    """Sessions that began on KV of an earlier one, since this span was loaded."""
    prefix_tokens: int = 0
    """Rows they had not to prefill."""
    skipped_rows: int = 0
    """Rows that died while they waited for the device, and were not computed."""
    shared_pages: int = 0
    """KV pages that several open sessions read now."""


@dataclass(frozen=True)
class Opened:
    """The session is reserved."""

    session: bytes
    epoch: int
    credit_rows: int
    """Rows the client may have in flight."""
    profile: Profile = ()
    """Measured at load for the session's own blocks: what a planner starts from."""
    prefix_rows: int = 0
    """The prompt's first so many tokens are here already: whole units of it."""


@dataclass(frozen=True, eq=False)
class Answer:
    """The target's own token for rows of one append, from the tail."""

    session: bytes
    epoch: int
    seq: int
    ids: Ids
    """Tree nodes answered, in the append's order; skipped rows are missing."""
    tokens: Ids
    logprobs: NDArray[np.float32]
    """Of each token under the target's filtered distribution."""
    timings: tuple[HopTiming, ...]
    alternatives: Ids = field(default_factory=no_alternatives)
    """[ids, k], or nothing: the best tokens by raw logit at the same rows, best first."""


@dataclass(frozen=True)
class Pong:
    """With how far the session's appends have come here, in its present epoch."""

    stamp: int
    received: int = 0
    passed_on: int = 0
    replayed: int = 0
    """Frames of a replay passed on, which come before any append."""


@dataclass(frozen=True)
class Fault:
    """Something went wrong; `fatal` means the session is gone (or never was)."""

    session: bytes
    code: FaultCode
    message: str
    fatal: bool


@dataclass(frozen=True)
class Records:
    """Signed records, each as its bytes; all of them first, then what is new."""

    sealed: tuple[bytes, ...]


@dataclass(frozen=True)
class DialledBack:
    reached: bool
    why: str
    """Why not; otherwise the address that was dialled."""


@dataclass(frozen=True)
class Managed:
    message: str


@dataclass(frozen=True)
class PortLeased:
    """Other machines dial `port`; the borrower fetches each of their connections at `fetch_port`, by its token."""

    port: int
    fetch_port: int


@dataclass(frozen=True)
class IncomingConnection:
    """Tell the borrower that a machine has dialled the leased port."""

    token: bytes


# ---------------------------------------------------------------- link


@dataclass(frozen=True)
class LinkHello:
    """First on a link stream: which session it feeds, and the right to."""

    version: int
    session: bytes
    epoch: int
    ticket: bytes
    warm_up: bytes = field(default=b"", repr=False)
    """Of no meaning: a burst that opens a new connection's window before the first tree needs it."""
    packs: bool = False
    """The upstream node could pack rows: one that can unpack them answers with a LinkWelcome."""


@dataclass(frozen=True)
class LinkWelcome:
    """To an upstream that packs.  Nodes of before packing send none, and are never sent packed rows."""

    unpacks: bool


@dataclass(frozen=True, eq=False)
class Append:
    """The one verb.  Commit a path of the crown, then add nodes; see ARCHITECTURE.md.

    Node i of the append has id `first_id + i`; a parent is a live crown node, an earlier node of this
    append, or the tip.  With `prefill` the nodes are a chain that joins the trunk at once.
    """

    epoch: int
    seq: int
    commit: Ids
    """Ids from just after the old tip to the new tip, in order."""
    first_id: int
    parents: Ids
    tokens: Ids
    prefill: bool
    answers: Answers
    settings: SamplingSettings
    skipped: NDArray[np.bool_]
    """Per row: an upstream node knew it dead and did not compute it."""
    hidden: bytes = field(default=b"", repr=False)
    """Activations entering this node, row-major [rows not skipped], as the class has them on links; empty towards the
    head."""
    timings: tuple[HopTiming, ...] = ()
    fresh: bool = False
    """After the commit, what is left of the crown is dead: the target's token was none of the new tip's children.
    Descent alone would keep them until the commit after this one, and every crown would need twice its room."""
    replay: bool = False
    """Rows of the trunk for a node that replaces a lost one: a prefill that nobody answers.  `seq` counts replays
    alone, and ids are positions + 1."""
    planes: int = 0
    """Bytes of a value in `hidden` where that is packed (`wire/planes.py`); 0: it is not, and inside a node never."""
    prefix: int = 0
    """In a session's first append: the trunk begins with so many rows that every node said it has."""

    @property
    def rows(self) -> int:
        return len(self.tokens)


ControlUp = Describe | Open | Resume | Hint | Ping | Close | Watch | DialBack | Manage | LeasePort
ControlDown = (
    Description | Opened | Answer | Pong | Fault | Records | DialledBack | Managed | PortLeased | IncomingConnection
)
LinkUp = LinkHello | Append
LinkDown = LinkWelcome
Message = ControlUp | ControlDown | LinkUp | LinkDown
