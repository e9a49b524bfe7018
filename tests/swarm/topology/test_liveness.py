"""Liveness: who is watched, whose silence is a death, and that words of others are none."""

from collections.abc import Iterable

from treeswarm.protocol.spans import Span
from treeswarm.topology.liveness import (
    LONGEST_PAUSE_S,
    WATCH_EVERY_S,
    WATCHERS,
    Liveness,
    nodes_to_probe,
    watched_by,
)
from treeswarm.topology.tables import Placed, PlacementTable

BLOCKS = 8


def table(**spans: tuple[int, int]) -> PlacementTable:
    return PlacementTable.of([Placed(node, Span(*span), 100.0, "online") for node, span in spans.items()])


def silent(liveness: Liveness, node: str, times: Iterable[float], generation: int = 1) -> Liveness:
    for at in times:
        liveness = liveness.with_silence(node, generation, at, at)
    return liveness


def test_two_silent_probes_and_another_answer_prove_a_death() -> None:
    once = silent(Liveness().with_answer("other", 10.0), "holder", [10.0])
    assert once.dead == frozenset()
    assert silent(once, "holder", [11.0]).dead == {"holder"}


def test_reports_of_many_nodes_delay_no_probe_that_matters() -> None:
    spans = {f"n{number:02}": (0, 4) for number in range(40)}
    swarm = table(holder=(4, 8), **spans)
    liveness = silent(Liveness().with_answer("n00", 9.0), "holder", [10.0])
    for node in list(spans)[1:20]:
        liveness = silent(liveness, node, [8.0])
    for node in list(spans)[20:]:
        liveness = liveness.with_report(node, 10.0)
    probed = nodes_to_probe(liveness, "own", swarm, BLOCKS, 20.0)
    assert "holder" in probed[:2]
    assert "n00" in probed[:2]  # its answer shows that the network of the node works
    assert set(spans) <= set(probed)


def test_reports_of_nodes_without_a_record_are_forgotten() -> None:
    liveness = Liveness().with_report("gone", 10.0).with_report("here", 10.0)
    assert liveness.known_as({"here": 1}).reported == {"here"}


def test_no_node_is_dead_while_the_own_network_may_be_down() -> None:
    liveness = silent(Liveness().with_answer("other", 9.0), "holder", [10.0, 11.0, 13.0])
    assert liveness.dead == frozenset()
    assert liveness.with_answer("other", 14.0).dead == {"holder"}


def test_an_answer_or_a_newer_record_ends_a_death() -> None:
    dead = silent(Liveness().with_answer("other", 10.0), "holder", [10.0, 11.0])
    assert dead.with_answer("holder", 12.0).dead == frozenset()
    assert dead.known_as({"holder": 1, "other": 1}).dead == {"holder"}
    renewed = dead.known_as({"holder": 2, "other": 1})
    assert renewed.dead == frozenset()
    assert nodes_to_probe(renewed, "me", table(holder=(0, 4), other=(4, 8)), BLOCKS, 12.0)[0] == "holder"


def test_a_report_alone_is_only_a_reason_to_probe() -> None:
    swarm = table(a=(0, 8), b=(0, 8), liar=(0, 8))
    assert nodes_to_probe(Liveness(), "me", swarm, BLOCKS, 0.0) == []
    reported = Liveness().with_report("a", 0.0)
    assert reported.dead == frozenset()
    assert nodes_to_probe(reported, "me", swarm, BLOCKS, 0.0) == ["a"]
    answered = reported.with_answer("a", 1.0)
    assert nodes_to_probe(answered.with_report("a", 2.0), "me", swarm, BLOCKS, 2.0) == [], "it answered just now"


def test_a_failed_probe_is_repeated_soon_and_then_more_rarely() -> None:
    pauses, now, liveness = list[float](), 0.0, Liveness()
    for _ in range(10):
        liveness = silent(liveness, "holder", [now])
        pauses.append(liveness.silences["holder"].probe_at - now)
        now = liveness.silences["holder"].probe_at
    assert pauses[0] == 1.0
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S


def test_only_holders_are_watched_and_again_after_a_while() -> None:
    swarm = table(alone=(0, 4), b=(4, 8), c=(4, 8))
    assert nodes_to_probe(Liveness(), "b", swarm, BLOCKS, 0.0) == ["alone"]
    answered = Liveness().with_answer("alone", 0.0)
    assert nodes_to_probe(answered, "b", swarm, BLOCKS, WATCH_EVERY_S / 2) == []
    assert nodes_to_probe(answered, "b", swarm, BLOCKS, WATCH_EVERY_S) == ["alone"]


def test_each_sole_holder_has_some_watchers_however_large_the_swarm() -> None:
    crowd = {f"n{number}": (0, 4) for number in range(200)}
    swarm = table(alone=(4, 8), **crowd)
    watchers = [node for node in crowd if "alone" in watched_by(node, swarm, BLOCKS)]
    assert WATCHERS <= len(watchers) <= WATCHERS + 1


def test_a_death_makes_other_holders_of_its_blocks_doubtful() -> None:
    crowd = {f"n{number}": (0, 4) for number in range(40)}
    swarm = table(rest=(4, 8), **crowd)
    dead = silent(Liveness().with_answer("rest", 10.0), "n0", [10.0, 11.0])
    doubted = [node for node in nodes_to_probe(dead, "me", swarm, BLOCKS, 11.0) if node in crowd]
    assert len(doubted) == 8
    proven = dead.with_answer(doubted[-1], 12.0)
    assert not [node for node in nodes_to_probe(proven, "me", swarm, BLOCKS, 12.0) if node in crowd]


def test_a_first_silence_makes_the_node_ask_another_one() -> None:
    swarm = table(alone=(0, 4), b=(4, 8), c=(4, 8))
    quiet = silent(Liveness().with_answer("c", 1.0), "alone", [2.0])
    assert nodes_to_probe(quiet, "b", swarm, BLOCKS, 3.0) == ["alone", "c"]
