"""A stalled frame is found at the first node that has not passed it on, and only after its deadline."""

from dataclasses import dataclass
from math import inf
from typing import Any

import pytest

from treeswarm.protocol.spans import Span
from treeswarm_client.chain.control_stream import NodeProgress
from treeswarm_client.chain.epoch import Epoch
from treeswarm_client.chain.in_flight import RowsInFlight
from treeswarm_client.chain.member import ChainMember
from treeswarm_client.chain.stall_detection import LEAST_IN_NODE_S, LEAST_ON_LINK_S, find_stalled_hop
from treeswarm_client.discovery.route import Hop

HOPS = [Hop(name, f"{name}:1", Span(i, i + 1)) for i, name in enumerate(("head", "middle", "tail"))]


@dataclass
class FakeControl:
    """The progress that a node's pongs reported."""

    progress: NodeProgress


def epoch_of(*progress: tuple[int, int], proven: bool = True, replays: bool = False) -> Epoch:
    """An epoch whose append 0 left at 0 s, with the number of appends that each node received and passed on."""
    members: list[Any] = [
        ChainMember(hop, FakeControl(NodeProgress(received, passed_on, known_at=inf)), proven=proven)  # type: ignore[arg-type]
        for hop, (received, passed_on) in zip(HOPS, progress, strict=True)
    ]
    return Epoch(0, members, RowsInFlight(_rows={0: 1}), forming=False, replays=replays)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_frame_that_does_not_arrive_stalls_on_its_link(index: int) -> None:
    epoch = epoch_of(*[(1, 1)] * index, *[(0, 0)] * (3 - index))
    assert find_stalled_hop(epoch, 0.1, LEAST_ON_LINK_S) is None
    stalled = find_stalled_hop(epoch, 0.1, LEAST_ON_LINK_S + 1)
    assert stalled is not None
    assert stalled[0] == HOPS[index]
    assert "a frame has been on its way there for 6 s" in str(stalled[1])


def test_a_frame_that_is_not_passed_on_stalls_in_its_node() -> None:
    epoch = epoch_of((1, 1), (1, 0), (0, 0))
    assert find_stalled_hop(epoch, 0.1, LEAST_IN_NODE_S) is None
    stalled = find_stalled_hop(epoch, 0.1, LEAST_IN_NODE_S + 1)
    assert stalled is not None
    assert stalled[0] == HOPS[1]
    assert "it computes for 61 s" in str(stalled[1])


def test_an_answer_that_does_not_arrive_is_held_by_the_tail() -> None:
    stalled = find_stalled_hop(epoch_of((1, 1), (1, 1), (1, 1)), 0.1, LEAST_ON_LINK_S + 1)
    assert stalled is not None
    assert stalled[0] == HOPS[2]
    assert "its answer" in str(stalled[1])


def test_deadlines_grow_with_the_usual_traversal_time() -> None:
    epoch = epoch_of((0, 0), (0, 0), (0, 0))
    assert find_stalled_hop(epoch, 10.0, 20.0) is None
    assert find_stalled_hop(epoch, 10.0, 21.0) is not None


def test_a_new_node_may_receive_its_replay_first() -> None:
    replaying = epoch_of((0, 0), (0, 0), (0, 0), proven=False, replays=True)
    assert find_stalled_hop(replaying, 0.1, LEAST_ON_LINK_S + 1) is None
    assert find_stalled_hop(replaying, 0.1, LEAST_IN_NODE_S + 1) is not None


def test_progress_at_a_node_moves_the_deadline() -> None:
    epoch = epoch_of((1, 1), (0, 0), (0, 0))
    control: Any = epoch.members[0].control
    control.progress = NodeProgress(1, 1, 0, changed_at=4.0, known_at=inf)
    assert find_stalled_hop(epoch, 0.1, 9.0) is None
    assert find_stalled_hop(epoch, 0.1, 10.0) is not None


def test_a_silent_node_is_no_evidence_of_a_stalled_frame() -> None:
    """A node on a loaded machine answers late: what it had by its last pong is all that is known."""
    epoch = epoch_of((1, 1), (0, 0), (0, 0))
    control: Any = epoch.members[1].control
    control.progress = NodeProgress(0, 0, known_at=LEAST_ON_LINK_S)
    assert find_stalled_hop(epoch, 0.1, 100.0) is None
    control.progress = NodeProgress(0, 0, known_at=LEAST_ON_LINK_S + 1)
    assert find_stalled_hop(epoch, 0.1, 100.0) is not None
