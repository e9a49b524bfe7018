"""The messages that clients and nodes exchange, as plain frozen data.

`wire/codec.py` turns these into the protobuf of `proto/treeswarm.proto` and back, and checks every field against the
limits below.  A message that has passed it is well-formed, but not necessarily true.  Arrays are NumPy and read-only;
all are one-dimensional except `Answer.alternatives`.

Two kinds of stream carry the messages:

    control  client → node: Describe, Open, Resume, Hint, Ping, Close; Watch, DialBack, Manage, LeasePort, ReportLost,
             FindSwarm, Drive
             node → client: Description, Opened, Answer and Proposal (from the tail), Pong, Fault; Records, DialledBack,
             Managed, PortLeased, IncomingConnection, SwarmFound, DrivenTokens
    link     upstream → downstream: LinkHello once, then Append after Append (the client is upstream of the head)
             downstream → upstream: LinkWelcome once if the hello asked for it, then nothing until the stream ends
"""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.drive_messages import Drive, DrivenTokens
from treeswarm.protocol.node_messages import (
    DialBack,
    DialledBack,
    FindSwarm,
    IncomingConnection,
    LeasePort,
    Manage,
    Managed,
    PortLeased,
    SwarmFound,
)

# Parts of this contract in a file of their own, so that the messages about driven texts can have them too.
from treeswarm.protocol.numerics import ACTIVATION_BLOCK as ACTIVATION_BLOCK  # noqa: PLC0414
from treeswarm.protocol.numerics import NumericsClass as NumericsClass  # noqa: PLC0414
from treeswarm.protocol.prefix import Prefix
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.protocol.tap_sums import TapRequest, TapSums
from treeswarm.protocol.text_rules import RulesRequest

# One append carries at most this many bytes of activations, so that a node computes while the next segment uploads.  A
# client cuts larger trees and prompts into several appends.
SEGMENT_BYTES = 1 << 20
# Larger than any segment with its ids, timings and headers; gRPC refuses larger frames before parsing.
MAX_MESSAGE_BYTES = 4 << 20
MAX_ROWS = 4096
MAX_CROWN = 4096
MAX_TRUNK = 1 << 22
MAX_HOPS = 256
MAX_TEXT = 4096
MAX_RECORD_BYTES = 600
MAX_RECORDS = 4096
MAX_LOST = 64
SIGNATURE_BYTES = 64
SESSION_ID_BYTES = 16
TICKET_BYTES = 16
MAX_PROFILE_POINTS = 16
MAX_PROFILE_US = 3_600_000_000  # one hour: longer than any forward that a client would wait for
# As many log-probabilities per token as OpenAI's API gives.  Drafters keep eight successors of a token.
MAX_ALTERNATIVES = 20
# A speculator expands some dozens of nodes, so larger proposals would only add nodes that are hardly ever right.
MAX_PROPOSAL = 256

NO_TOKEN = 2**32 - 1
"""Answer for a row after which the rules of the request allow no token at all."""

Ids = NDArray[np.uint32]
"""Ids of tree nodes or of tokens."""
Profile = tuple[tuple[int, int], ...]
"""How long a node's forward takes, as (rows, microseconds) with rising rows; empty if the node has not measured it."""


def no_logprobs() -> NDArray[np.float32]:
    """Return the log-probabilities of no alternatives: float32 [0, 0]."""
    return np.empty((0, 0), np.float32)


def no_tokens() -> Ids:
    """Return no tokens: uint32 [0]."""
    return np.empty(0, np.uint32)


def no_alternatives() -> Ids:
    """Return the alternatives of an answer for which none were requested: uint32 [0, 0]."""
    return np.empty((0, 0), np.uint32)


class Answers(StrEnum):
    """The rows of an append for which the tail computes the target's token."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


class FaultCode(StrEnum):
    """The kind of a fault or of a refusal."""

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
    """The append was received before, or the epoch is over."""
    NOT_FINITE = "not-finite"
    DOWNSTREAM = "downstream"
    DRAINING = "draining"
    NO_JOURNAL = "no-journal"
    """The node lacks the replay log or the text that a resumption needs."""
    EXPIRED = "expired"
    TOO_MANY = "too-many"
    INTERNAL = "internal"
    REFUSED = "refused"
    BAD_RULES = "bad-rules"
    """The rules of the request cannot be applied, at this node or any other."""


@dataclass(frozen=True)
class HopTiming:
    """How long one node took for one append, by the node's own clock."""

    queue_us: int
    """Microseconds from the arrival of the append to the start of its forward."""
    compute_us: int
    """Microseconds that its forward took in the device thread, with all other appends of the batch."""
    rows: int
    """Number of rows of this append that the node computed."""
    batch_sessions: int
    """Number of sessions in that forward."""


# ---------------------------------------------------------------- control, client to node


@dataclass(frozen=True)
class Describe:
    """Ask a node for its Description."""

    version: int


@dataclass(frozen=True)
class NextHop:
    """The downstream node of a session."""

    address: str
    ticket: bytes
    """Ticket that the downstream node expects on the link."""


@dataclass(frozen=True)
class Resumption:
    """The text from which a session continues after a node was lost: every surviving node is sure to have it."""

    trunk_length: int
    """Number of tokens of that text."""
    tip: int
    """New id of its last token, chosen by the client and never used before."""


@dataclass(frozen=True)
class Open:
    """Reserve a session on a node.  Every node of the chain gets an Open of its own."""

    version: int
    session: bytes
    """Random id of the session, SESSION_ID_BYTES long."""
    epoch: int
    span: Span
    """Blocks that the node computes for this session: part of what it serves."""
    numerics: NumericsClass
    trunk_room: int
    """Largest number of committed tokens, prompt and answer together."""
    crown_room: int
    """Largest number of speculated rows alive at once."""
    ticket: bytes
    """Ticket that the upstream link must show."""
    next_hop: NextHop | None
    """The downstream node, or None if this node is the tail."""
    resumption: Resumption | None = None
    """The text of which the rows are replayed first, because this node replaces a lost one; None for a new session."""
    forwards_replay: bool = False
    """True if the downstream node replaces a lost one too and needs the replayed rows."""
    prefix: Prefix | None = None
    """The prompt's prefix whose KV may be shared, or None if it may not be."""
    alternatives: int = 0
    """Number of the target's best tokens that the tail sends with every answered row."""
    proposal_nodes: int = 0
    """Most nodes of the trees that the tail's speculator proposes, or 0 for no proposals."""
    taps: TapRequest | None = None
    """What the node adds to the sums of a head's taps, or None if it sends no sums on."""
    rules: RulesRequest | None = None
    """What the tail does to logits before it chooses tokens, or None for nothing."""
    alternative_logprobs: bool = False
    """True if the tail sends the log-probabilities of the alternatives too."""


@dataclass(frozen=True)
class Resume:
    """Tell a surviving node to cut its trunk back, drop its crown and continue in a new epoch."""

    version: int
    session: bytes
    epoch: int
    resumption: Resumption
    ticket: bytes
    next_hop: NextHop | None
    replays: bool
    """True if the downstream node is new: the node first sends it the rows of its replay log."""
    taps: TapRequest | None = None
    """What the node adds to the sums of a head's taps in the new epoch, or None if it sends no sums on."""


@dataclass(frozen=True)
class Hint:
    """Tell a node early which tip the walk has reached, so that it need not compute rows elsewhere in the tree.

    A hint changes no state: the append that commits the path follows.
    """

    session: bytes
    trunk_length: int
    """Length of the trunk once `tip` is part of it."""
    tip: int
    """Id of the tree node that becomes the tip."""


@dataclass(frozen=True)
class Ping:
    """Check that a node answers; the Pong returns `stamp` unchanged."""

    stamp: int
    session: bytes = b""
    """Session whose progress the Pong reports, or empty for none."""


@dataclass(frozen=True)
class Close:
    """Tell a node to free the session, or to end the driven text of that id, now."""

    session: bytes


@dataclass(frozen=True)
class Watch:
    """Ask a node for signed records, now and at every change.  `clock` is the sender's, in µs since 1970, or 0."""

    version: int
    everyone: bool
    """True for the records of all nodes that the node knows, False for its own record alone."""
    clock: int = 0


@dataclass(frozen=True)
class ReportLost:
    """Report nodes (at most MAX_LOST ids) that do not answer.  The receiver believes only its own probes of them."""

    nodes: tuple[str, ...]


# ---------------------------------------------------------------- control, node to client


@dataclass(frozen=True)
class Description:
    """What a node serves, and its counters."""

    version: int
    software: str
    span: Span
    blocks: int
    """Number of decoder blocks of the whole model."""
    vocab_size: int
    hidden_size: int
    max_positions: int
    config: str
    """Hex digest of the part of the config that numerics depend on; a client without weights can compute it too."""
    numerics: NumericsClass
    attention: str
    """Name of the attention adapter in use, such as `torch-reference`."""
    trunk_free: int
    """Number of KV rows that no session has reserved."""
    frames: int
    """Number of appends computed since start."""
    forwards: int
    """Number of forwards since start."""
    forward_sessions: int
    """Sum over those forwards of the number of sessions in each."""
    sessions: int = 0
    """Number of sessions open now."""
    opened: int = 0
    """Number of sessions opened since start."""
    resumed: int = 0
    """Number of epochs begun since start in sessions that had lost another node."""
    refused: int = 0
    """Number of sessions refused since start."""
    prefix_hits: int = 0
    """Number of sessions that began on KV of an earlier session, since this span was loaded."""
    prefix_tokens: int = 0
    """Number of rows that those sessions did not have to prefill."""
    skipped_rows: int = 0
    """Number of rows that died while they waited for the device and were not computed."""
    shared_pages: int = 0
    """Number of KV pages that several open sessions read now."""


@dataclass(frozen=True)
class Opened:
    """Confirm that a session is reserved, or that it has resumed."""

    session: bytes
    epoch: int
    credit_rows: int
    """Largest number of rows that the client may have in flight."""
    profile: Profile = ()
    """Forward times for the session's own blocks, measured at load: a planner's first estimate."""
    prefix_rows: int = 0
    """Number of the prompt's first tokens whose KV the node has already, in whole units."""
    proposal_nodes: int = 0
    """Most nodes of the trees that this tail may propose in the session, or 0 if it proposes none."""
    rules_digest: bytes = b""
    """Digest of the rules that this tail applies (`RulesRequest.digest`), or empty for none."""


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """The model's own log-probabilities of the tokens that an append named, before rules and filters."""

    logprobs: NDArray[np.float32]
    """Log-probability of each token, float32 [n]."""
    alternatives: Ids = field(default_factory=no_alternatives)
    """The best tokens at the same rows, best first, as in an Answer."""
    alternative_logprobs: NDArray[np.float32] = field(default_factory=no_logprobs)
    """Log-probability of each of these, float32 [n, k], or [0, 0] if none were requested."""


@dataclass(frozen=True, eq=False)
class Answer:
    """The target's own tokens for rows of one append; the tail sends it."""

    session: bytes
    epoch: int
    seq: int
    """Sequence number of the append."""
    ids: Ids
    """Ids of the tree nodes answered, uint32 [n], in the append's order; skipped rows are missing."""
    tokens: Ids
    """The target's token after each of these nodes, uint32 [n]; NO_TOKEN where the rules allow none."""
    logprobs: NDArray[np.float32]
    """Log-probability of each token under the model's own distribution, before rules and filters, float32 [n]."""
    timings: tuple[HopTiming, ...]
    """Timings of the append at every node of the chain, in order."""
    alternatives: Ids = field(default_factory=no_alternatives)
    """The best tokens by raw logit at the same rows, best first: uint32 [n, k], or [0, 0] if none were requested."""
    alternative_logprobs: NDArray[np.float32] = field(default_factory=no_logprobs)
    """Log-probability of each of these under the model's own distribution, float32 [n, k], or [0, 0]."""
    scored: ScoredRows | None = None
    """Log-probabilities of the tokens that the append named, or None if it named none."""


@dataclass(frozen=True, eq=False)
class Proposal:
    """A tree that the tail's speculator guesses below the end of a walk, best nodes first."""

    session: bytes
    epoch: int
    tip: int
    """Id of the last node of the walk."""
    root: int
    """The target's token after it, which is the root of the tree."""
    parents: Ids
    """Place of each node's parent, uint32 [n]: 0 for the root, else 1 + its index, which is less than the node's."""
    tokens: Ids
    """Token of each node, uint32 [n]."""
    scores: NDArray[np.float32]
    """Log of the chance that the target's choices follow the path to each node, float32 [n]; they never rise."""


@dataclass(frozen=True)
class Pong:
    """Answer a Ping, with the progress of its session in the session's present epoch."""

    stamp: int
    received: int = 0
    """Number of appends that have arrived at the node."""
    passed_on: int = 0
    """Number of appends that the node has sent on."""
    replayed: int = 0
    """Number of replayed frames sent on, which come before any append."""


@dataclass(frozen=True)
class Fault:
    """Report an error of a session, or of the whole stream."""

    session: bytes
    """The session, or empty for the stream as a whole."""
    code: FaultCode
    message: str
    fatal: bool
    """True if the session is gone or was never opened."""


@dataclass(frozen=True)
class Records:
    """Signed records as bytes: all known ones at first, later only new ones.  `clock` is the sender's, as in Watch."""

    sealed: tuple[bytes, ...]
    clock: int = 0


@dataclass(frozen=True)
class LinkHello:
    """Open a link stream for one session; the first message on it."""

    version: int
    session: bytes
    epoch: int
    ticket: bytes
    """The ticket that the client gave to both ends of the link."""
    warm_up: bytes = field(default=b"", repr=False)
    """Bytes without meaning: they open the window of a new connection before the first tree needs it."""
    packs: bool = False
    """True if the upstream node can compress rows; a node that can decompress them answers with a LinkWelcome."""


@dataclass(frozen=True)
class LinkWelcome:
    """Answer an upstream node that can compress rows.

    Releases from before compression send no LinkWelcome and never get compressed rows.
    """

    unpacks: bool
    """True if the sender can decompress rows."""


@dataclass(frozen=True, eq=False)
class Append:
    """Commit a path of the crown, then add nodes: the one message that changes a session's tree.

    Node i of the append has id `first_id + i`.  Its parent is a live crown node, an earlier node of this append, or the
    tip.  With `prefill` the nodes are a chain that joins the trunk at once.  See ARCHITECTURE.md.
    """

    epoch: int
    seq: int
    """Sequence number, counted from 0 in every epoch."""
    commit: Ids
    """Ids from just after the old tip to the new tip, in order."""
    first_id: int
    parents: Ids
    """Id of each node's parent, uint32 [rows]."""
    tokens: Ids
    """Token of each node, uint32 [rows]."""
    prefill: bool
    answers: Answers
    settings: SamplingSettings
    skipped: NDArray[np.bool_]
    """True for each row that an upstream node knew to be dead and did not compute, bool [rows]."""
    hidden: bytes = field(default=b"", repr=False)
    """Activations that enter this node, row-major [rows not skipped], as on links; empty on the way to the head."""
    timings: tuple[HopTiming, ...] = ()
    """Timings of this append at the nodes before, in order."""
    fresh: bool = False
    """True if the rest of the crown is dead after the commit, because the target's token was none of the new tip's
    children.  The commit alone would keep nodes below the new tip until the next one, and every crown would need twice
    its room."""
    replay: bool = False
    """True for rows of the trunk that are sent to a node that replaces a lost one: a prefill without answers.  `seq`
    counts replays alone, and ids are positions + 1."""
    planes: int = 0
    """Number of bytes per value in `hidden` if it is compressed (`wire/byte_planes.py`), or 0; 0 inside a node."""
    prefix: int = 0
    """Number of rows at the beginning of the trunk that all nodes reported to have, in a session's first append."""
    tap_sums: TapSums | None = None
    """Sums of the taps of the blocks before, or None if no row has one."""
    scored: Ids = field(default_factory=no_tokens)
    """Tokens after the first rows of a prefill whose log-probabilities the tail sends, uint32 [up to rows]."""

    @property
    def rows(self) -> int:
        """Number of nodes that the append adds."""
        return len(self.tokens)


ControlUp = (
    Describe | Open | Resume | Hint | Ping | Close | Watch | DialBack | Manage | LeasePort | ReportLost | FindSwarm
    | Drive
)  # fmt: skip
ControlDown = (
    Description | Opened | Answer | Proposal | Pong | Fault | Records | DialledBack | Managed | PortLeased
    | IncomingConnection | SwarmFound | DrivenTokens
)  # fmt: skip
LinkUp = LinkHello | Append
LinkDown = LinkWelcome
Message = ControlUp | ControlDown | LinkUp | LinkDown
