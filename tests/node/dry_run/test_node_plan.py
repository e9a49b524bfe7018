"""The fewest nodes hold the whole model, within what fits and where it may be cut."""

from hypothesis import given
from hypothesis import strategies as st

from treeswarm_node.dry_run.node_plan import NodePlan, NumberFormat, plan_nodes
from treeswarm_node.model.memory_fit import USABLE_SHARE, EndWeights, Footprint, NodeRoom

FORMAT = NumberFormat("bfloat16")


def plan_for(fit: int, cuts: list[int], refusal: str | None = None, head: int = 0, tail: int = 0) -> NodePlan:
    """Return the plan of nodes with room for `fit` blocks of 1000 bytes; the ends weigh as much as so many blocks."""
    room = NodeRoom(memory=int((fit * 1000 + 500) / USABLE_SHARE), store=None, kv_tokens=1, forward_rows=1)
    ends = EndWeights(0, 1000 * head, 1000 * tail, 1000 * (head + tail))
    return plan_nodes(FORMAT, Footprint(block=990, ends=ends, kv_row=10, forward_row=0), room, cuts, refusal)


@given(st.integers(1, 60), st.integers(1, 60))
def test_spans_tile_the_model_with_the_fewest_nodes(fit: int, blocks: int) -> None:
    plan = plan_for(fit, list(range(blocks + 1)))
    assert plan.fit == min(fit, blocks)
    assert [block for span in plan.spans for block in range(span.start, span.end)] == list(range(blocks))
    assert len(plan.spans) == -(-blocks // fit) <= plan.nodes_choosing
    assert max(map(len, plan.spans)) <= fit


@given(st.integers(2, 40), st.integers(2, 60), st.integers(0, 39), st.integers(0, 39))
def test_spans_at_the_ends_leave_room_for_their_weights(fit: int, blocks: int, head: int, tail: int) -> None:
    head, tail = min(head, fit - 1), min(tail, fit - 1)
    plan = plan_for(fit, list(range(blocks + 1)), head=head, tail=tail)
    assert [block for span in plan.spans for block in range(span.start, span.end)] == list(range(blocks))
    if len(plan.spans) == 1:
        assert blocks + head + tail <= fit
        return
    first, *middle, last = plan.spans
    assert len(first) + head <= fit >= len(last) + tail
    assert all(len(span) <= fit for span in middle)
    between = blocks - min(fit - head, blocks - 1) - min(fit - tail, blocks - 1)
    assert len(plan.spans) == 2 + max(0, -(-between // fit)) <= plan.nodes_choosing
    assert plan.peak <= fit * 1000


def test_nodes_without_room_for_an_end_are_named() -> None:
    plan = plan_for(4, list(range(9)), tail=4)
    assert (plan.fit, plan.limits.tail, plan.spans) == (4, 0, [])
    assert plan.refusal == "the last block and the LM head do not fit on such a node: give it more memory"


def test_spans_end_where_the_model_may_be_cut() -> None:
    assert [str(span) for span in plan_for(4, [0, 3, 6, 7]).spans] == ["0:3", "3:7"]


def test_blocks_that_cannot_be_divided_are_a_refusal() -> None:
    plan = plan_for(2, [0, 1, 6])
    assert (plan.fit, plan.spans) == (2, [])
    assert "blocks 1:6 share keys and values and cannot be divided" in (plan.refusal or "")


def test_format_that_no_node_hosts_has_no_spans() -> None:
    plan = plan_for(4, [0, 1, 2], "no kernel")
    assert (plan.fit, plan.refusal, plan.nodes_choosing) == (0, "no kernel", 0)
