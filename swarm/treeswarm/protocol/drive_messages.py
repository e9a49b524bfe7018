"""Messages of control streams about driven texts: a node runs the loop of a generation in place of the client."""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.numerics import NumericsClass
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.protocol.text_rules import RulesRequest

# Half of what a message may have: prompts of half a million tokens.
MAX_DRIVEN_PROMPT = 1 << 19
MAX_STOP_IDS = 256
# A day: a traversal, its repairs included, is given up long before.
MAX_TRAVERSAL_US = 86_400_000_000
# A client counts every repair.
MAX_REPAIRS = 1000


class DriverKind(IntEnum):
    """Whether a node drives texts, and with what it drafts, as its record says."""

    NONE = 0
    """The node drives no texts."""
    TABLES = 1
    """The node drives texts and drafts without a model."""
    MODEL = 2
    """The node drives texts and drafts with a model."""
    TAIL = 3
    """The node drives texts and drafts with what the tail proposes, and without a model where no tail proposes."""


@dataclass(frozen=True, eq=False)
class Drive:
    """Ask a node to run the loop of one generation.  A Close with its `text` ends it before."""

    version: int
    text: bytes
    """Random id of the text, SESSION_ID_BYTES long."""
    numerics: NumericsClass
    """Numerics class in which the nodes of the chain must compute."""
    prompt: NDArray[np.uint32]
    settings: SamplingSettings
    max_new_tokens: int
    stop_ids: NDArray[np.uint32]
    """Ids of the tokens that end the text."""
    tree_size: int | None
    """Number of draft nodes per traversal, or None if the driver chooses it each round."""
    prefix_secret: bytes = field(default=b"", repr=False)
    """Secret of the texts that share the KV of their beginnings, SCOPE_BYTES long, or empty for none."""
    rules: RulesRequest | None = None
    """Rules of the text, or None for none; their prompt is the client's, without what other drivers generated."""


@dataclass(frozen=True)
class DrivenTraversal:
    """What one traversal of a driven text cost, by the driver's clock."""

    seconds_us: int
    """Microseconds from the first append to the end of the walk."""
    compute_us: int
    """Microseconds of forwards, summed over the hops."""
    queue_us: int
    """Microseconds of waiting for devices, summed over the hops."""
    draft_us: int
    """Microseconds for which the round waited for its draft while nothing travelled."""
    rows: int
    """Number of tree nodes or prompt tokens that it carried."""
    drafted: int
    """Number of drafted nodes shipped."""
    accepted: int
    """Number of drafted nodes that the walk followed."""
    missed: bool
    """True if a tree was shipped; its walk ended at a miss."""
    repairs: int
    """Number of times that the chain was repaired meanwhile."""


@dataclass(frozen=True)
class DrivenHop:
    """One node of the chain of a driven text."""

    node: str
    """Id of the node."""
    address: str
    """Address of the node, without a pin."""
    span: Span


@dataclass(frozen=True, eq=False)
class DrivenTokens:
    """The tokens that one traversal of a driven text brought."""

    text: bytes
    tokens: NDArray[np.uint32]
    logprobs: NDArray[np.float32]
    """The target's log-probability of each token."""
    traversal: DrivenTraversal
    hops: tuple[DrivenHop, ...] = ()
    """The chain, in the first message and whenever it has changed; otherwise empty."""
    prefix_rows: int = 0
    """Number of the prompt's tokens that the nodes had already."""
