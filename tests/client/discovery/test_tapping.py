"""A chain has all taps of the tail's head if every node from the first tapped block on has that head."""

import pytest

from treeswarm.protocol.spans import Span
from treeswarm_client.discovery.route import Hop
from treeswarm_client.discovery.tapping import hops_without_head, tapping_hops

TAPS = (2, 4, 7)


def hop(start: int, end: int, head: str = "h", speculator: str = "") -> Hop:
    return Hop(f"{start}", f"{start}:1", Span(start, end), speculator, head, TAPS if head else ())


def tail(start: int, head: str = "h") -> Hop:
    return hop(start, 8, head, "autoregressive")


@pytest.mark.parametrize(
    ("hops", "asked", "lacking"),
    [
        ([hop(0, 3), hop(3, 5), tail(5)], "03", ""),
        ([hop(0, 2, ""), hop(2, 5), tail(5)], "2", ""),
        ([hop(0, 3), hop(3, 4, ""), hop(4, 5), tail(5)], "034", "3"),
        ([hop(0, 3), hop(3, 5, "other"), tail(5)], "03", "3"),
        ([hop(0, 2), tail(2)], "", ""),
        ([tail(0)], "", ""),
        ([hop(0, 3), hop(3, 5), hop(5, 8)], "", ""),
        ([hop(0, 3, ""), Hop("3", "3:1", Span(3, 8), "mlp")], "", ""),
        ([], "", ""),
    ],
    ids=["three taps", "taps begin later", "a relay lacks it", "another head", "all at the tail", "one node",
         "no speculator", "a speculator without sums", "no chain"],
)  # fmt: skip
def test_nodes_from_the_first_tapped_block_on_are_asked(hops: list[Hop], asked: str, lacking: str) -> None:
    assert "".join(each.node for each in tapping_hops(hops)) == asked
    assert "".join(each.node for each in hops_without_head(hops)) == lacking
