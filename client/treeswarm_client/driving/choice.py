"""Which node drives a text, if any: by predicted seconds per traversal, and by what it drafts with.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.topology.routing import LEAST_GAIN
from treeswarm_client.discovery.route import Hop

# A draft model that fits its target brought at most this many times the tokens of n-grams per traversal: 5.2 to 7.4
# against 3.0 to 3.75 on the bundled pair (2026-11-30).  A client with such a model gives it up for less distance only
# where the distance is worth more.
MODEL_OVER_TABLES = 2.5


@dataclass(frozen=True)
class DriverOffer:
    """A node that drives texts."""

    hop: Hop
    """The node, with the blocks that it serves."""
    kind: DriverKind
    traversal_s: float
    """Predicted seconds of one traversal that begins and ends at this node."""


def choose_driver(
    self_s: float, offers: Sequence[DriverOffer], own_draft: DriverKind, *, plain: bool
) -> DriverOffer | None:
    """Return the offer with which a text is expected to end soonest, or None if the client drives as fast itself.

    `self_s` are the predicted seconds of one traversal that begins and ends at the client, which drafts with
    `own_draft`; `plain` says that nothing is drafted.  A driver must gain a tenth: estimates are off by some percent.
    """
    best = min(offers, key=lambda offer: _weighted(offer, own_draft, plain), default=None)
    if best is None or _weighted(best, own_draft, plain) >= (1 - LEAST_GAIN) * self_s:
        return None
    return best


def _weighted(offer: DriverOffer, own_draft: DriverKind, plain: bool) -> float:
    """Return the seconds of a traversal, times the tokens that worse drafts lose."""
    loses_model = own_draft is DriverKind.MODEL and offer.kind is DriverKind.TABLES and not plain
    return offer.traversal_s * (MODEL_OVER_TABLES if loses_model else 1.0)
