"""The append builder against the nodes' state machine: whatever is lost, and whenever, the text is complete."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm.protocol.messages import Answers, Append, Resumption
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.replay import replay
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_client.drafters.seam import NO_TREE, DraftTree
from treeswarm_client.generation.append_builder import AppendBuilder, Shipment

CROWN, ROOM, VOCAB = 16, 300, 50


def tree_of(parents: list[int], tokens: list[int]) -> DraftTree:
    return DraftTree(np.array(parents, np.int64), np.array(tokens, np.int64), np.zeros(len(tokens), np.float32))


def builder_of(segment_rows: int = 4, epoch: int = 0) -> AppendBuilder:
    return AppendBuilder(SamplingSettings(), segment_rows, epoch)


def summary(append: Append) -> tuple[object, ...]:
    """Return the fields of an append that tests compare."""
    return (append.epoch, append.seq, append.commit.tolist(), append.parents.tolist(), append.tokens.tolist())


# ---------------------------------------------------------------- by hand


def test_a_prompt_is_cut_and_only_its_last_token_answered() -> None:
    shipment = builder_of().prefill(range(10, 20))
    assert [append.rows for append in shipment.appends] == [4, 4, 2]
    assert [append.answers for append in shipment.appends] == [Answers.NONE, Answers.NONE, Answers.LAST]
    assert shipment.answer_ids.tolist() == [10]


def test_an_unanswered_prompt_is_sent_again_below_a_new_root() -> None:
    builder = builder_of()
    lost = builder.prefill([7, 8, 9])
    assert builder.resumption(0) == ([], 4)
    again = builder.ship_again(lost, 2)
    (append,) = again.appends
    assert summary(append) == (2, 0, [], [4, 5, 6], [7, 8, 9])
    assert append.answers is Answers.LAST
    assert again.answer_ids.tolist() == [7]


def test_the_answered_half_of_a_prompt_is_not_sent_again() -> None:
    builder = builder_of()
    lost = builder.prefill([11, 12, 13, 14, 15, 16])
    trunk, tip = builder.resumption(1)
    assert (trunk, tip) == ([11, 12, 13, 14], 7)
    (append,) = builder.ship_again(lost, 1).appends
    assert summary(append) == (1, 0, [], [7, 8], [15, 16])


def test_a_lost_round_ships_the_path_as_text_and_its_tree_again() -> None:
    builder = builder_of()
    builder.prefill([1, 2])
    first = builder.round(3, tree_of([-1, 0], [4, 5]))
    builder.accept(first, [0, 1])
    second = builder.round(6, tree_of([-1], [7]))
    assert second.appends[0].commit.tolist() == first.answer_ids.tolist()
    trunk, tip = builder.resumption(2)  # the prompt's answer and the first round's are here
    assert trunk == [1, 2]
    again = builder.ship_again(second, 5)
    catch_up, tree = again.appends
    assert summary(catch_up) == (5, 0, [], [tip, tip + 1, tip + 2], [3, 4, 5])
    assert catch_up.prefill
    assert catch_up.answers is Answers.NONE
    assert summary(tree) == (5, 1, [], [tip + 3, tip + 4], [6, 7])
    assert tree.fresh
    assert again.answer_ids.tolist() == [tip + 4, tip + 5]
    assert again.draft is second.draft


def test_a_second_loss_starts_from_the_same_text_with_a_new_id() -> None:
    builder = builder_of()
    builder.prefill([1, 2])
    lost = builder.round(3, NO_TREE)
    trunk, tip = builder.resumption(1)
    again = builder.ship_again(lost, 1)
    trunk_again, tip_again = builder.resumption(0)
    assert trunk_again == trunk == [1, 2]
    assert tip_again > max(tip, *again.answer_ids.tolist())


# ---------------------------------------------------------------- against nodes


@dataclass
class Chain:
    """Two nodes.  Either may be lost, and then the trunk is replayed into a new one."""

    nodes: list[NodeSession] = field(default_factory=lambda: [new_node(0), new_node(0)])
    texts: list[list[int]] = field(default_factory=lambda: [[], []])
    """Trunk of each node, by the steps it ran."""
    crowns: list[dict[int, int]] = field(default_factory=lambda: [{}, {}])
    """Token in each crown slot of each node."""

    def ship(self, appends: tuple[Append, ...]) -> None:
        for place in range(2):
            for append in appends:
                self.run(place, append)

    def run(self, place: int, append: Append) -> None:
        node, text, crown = self.nodes[place], self.texts[place], self.crowns[place]
        for step in node.receive(append):
            text += [crown[slot] for slot in step.commit_slots.tolist()]
            if step.append.prefill:
                text += step.tokens.tolist()
            else:
                crown.update(zip(step.slots.tolist(), step.tokens.tolist(), strict=True))
            assert len(text) == node.tree.trunk_length
            node.finish(step)

    def repair(self, lost: int, epoch: int, trunk: list[int], tip: int) -> None:
        kept = 1 - lost
        self.nodes[kept].resume(epoch, Resumption(len(trunk), tip))
        del self.texts[kept][len(trunk) :]
        assert self.texts[kept] == trunk
        self.nodes[lost] = new_node(epoch, Resumption(len(trunk), tip))
        self.texts[lost], self.crowns[lost] = [], {}
        for append in replay(epoch, trunk):
            self.run(lost, append)
        assert self.texts[lost] == trunk


def new_node(epoch: int, resumption: Resumption | None = None) -> NodeSession:
    return NodeSession(SessionTerms(epoch, ROOM, CROWN, 10_000, VOCAB, 0, resumption))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_node_ends_with_the_text_whatever_is_lost(data: st.DataObject) -> None:
    """Nodes are lost after any number of the shipped appends, also several times in a row."""
    tokens = st.integers(0, VOCAB - 1)
    builder, chain, epoch = builder_of(data.draw(st.integers(1, 6))), Chain(), 0
    text = data.draw(st.lists(tokens, min_size=1, max_size=12))
    answered = 0

    def deliver(shipment: Shipment) -> Shipment:
        nonlocal answered, epoch
        while True:
            arrived = data.draw(st.integers(0, len(shipment.appends)))
            lost = data.draw(st.sampled_from([None, None, 0, 1]))
            if lost is None:
                chain.ship(shipment.appends)
                answered += len(shipment.appends)
                return shipment
            chain.ship(shipment.appends[:arrived])
            trunk, tip = builder.resumption(answered + data.draw(st.integers(0, arrived)))
            assert trunk == text[: len(trunk)]
            epoch, answered = epoch + 1, 0
            chain.repair(lost, epoch, trunk, tip)
            shipment = builder.ship_again(shipment, epoch)

    deliver(builder.prefill(text))
    for _ in range(data.draw(st.integers(0, 6))):
        bonus = data.draw(tokens)
        text = [*text, bonus]
        size = data.draw(st.integers(0, CROWN - 1))
        parents = [data.draw(st.integers(-1, i - 1)) for i in range(size)]
        tree = tree_of(parents, [data.draw(tokens) for _ in range(size)])
        shipment = deliver(builder.round(bonus, tree))
        for node_text in chain.texts:
            assert node_text == text[: len(node_text)]
            assert len(node_text) == len(text) - 1
        path: list[int] = []
        if size and data.draw(st.booleans()):
            end = data.draw(st.integers(0, size - 1))
            while end >= 0:
                path.insert(0, end)
                end = parents[end]
        builder.accept(shipment, path)
        text = [*text, *tree.tokens[path].tolist()]
