"""Which node drives a text, if any: by predicted seconds per traversal, and by what it drafts with.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.topology.routing import LEAST_GAIN
from treeswarm_client.discovery.route import Hop
from treeswarm_client.drafters.selection.automatic import MODELLESS, TAIL, DraftChoice

# A draft model that fits its target brought at most this many times the tokens of n-grams per traversal: 5.2 to 7.4
# against 3.0 to 3.75 on the bundled pair (2026-11-30).  A client with such a model gives it up for less distance only
# where the distance is worth more.  A speculator beside the tail counts like such a model.
MODEL_OVER_TABLES = 2.5


@dataclass(frozen=True)
class DriverOffer:
    """A node that drives texts."""

    hop: Hop
    """The node, with the blocks that it serves."""
    kind: DriverKind
    traversal_s: float
    """Predicted seconds of one traversal that begins and ends at this node."""


@dataclass(frozen=True)
class DraftsHere:
    """What a client that drives by itself has to draft with."""

    kind: DriverKind
    plain: bool = False
    """Whether nothing is drafted."""
    tail_proposes: bool = False
    """Whether the tail of the chain has a speculator, for whatever drives."""

    def weigh(self, offer: DriverOffer) -> float:
        """Return the seconds of a traversal that is driven so, times the tokens that worse drafts lose."""
        loses = not self.plain and self._is_good(self.kind) and not self._is_good(offer.kind)
        return offer.traversal_s * (MODEL_OVER_TABLES if loses else 1.0)

    def _is_good(self, kind: DriverKind) -> bool:
        return kind is DriverKind.MODEL or (kind is DriverKind.TAIL and self.tail_proposes)


def choose_driver(self_s: float, offers: Sequence[DriverOffer], here: DraftsHere) -> DriverOffer | None:
    """Return the offer with which a text is expected to end soonest, or None if the client drives as fast itself.

    `self_s` are the predicted seconds of one traversal that begins and ends at the client, which drafts with what is
    `here`.  A driver must gain a tenth: estimates are off by some percent.
    """
    best = min(offers, key=here.weigh, default=None)
    if best is None or here.weigh(best) >= (1 - LEAST_GAIN) * self_s:
        return None
    return best


def kind_of_draft(choice: DraftChoice) -> DriverKind:
    """Return what a driver that drafts so announces of itself."""
    if choice.name.startswith(TAIL) or (choice.automatic and choice.name == "ngram"):
        return DriverKind.TAIL  # n-grams that were chosen make room for what a tail proposes
    return DriverKind.TABLES if choice.name in MODELLESS else DriverKind.MODEL
