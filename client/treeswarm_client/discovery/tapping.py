"""Which nodes of a chain add the taps of the tail's head, and whether all that must do so can.  Pure."""

from collections.abc import Sequence

from treeswarm_client.discovery.route import Hop


def tapping_hops(hops: Sequence[Hop]) -> tuple[Hop, ...]:
    """Return the nodes that must add taps or pass sums on: all before the tail from the first tapped block on.

    There are none if the tail has no head, or computes all tapped blocks itself.
    """
    tail = hops[-1] if hops else None
    if tail is None or not tail.speculator or not tail.taps or tail.taps[0] >= tail.span.start:
        return ()
    return tuple(hop for hop in hops[:-1] if hop.span.end > tail.taps[0])


def hops_without_head(hops: Sequence[Hop]) -> tuple[Hop, ...]:
    """Return the nodes that must add taps or pass sums on and cannot, because they have not the tail's head."""
    return tuple(hop for hop in tapping_hops(hops) if hop.tap_head != hops[-1].tap_head)
