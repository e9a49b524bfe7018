"""Rounds do not wait for a draft that a busy machine holds up, and trees come back when it is there."""

from treeswarm_bench.benchmarks.disturbed.cases import disturbed_case, plain_round_s
from treeswarm_bench.benchmarks.disturbed.play import play
from treeswarm_bench.benchmarks.disturbed.text import scripted_text
from treeswarm_bench.benchmarks.disturbed.world import Script
from treeswarm_client.planner.explain import FIRST_FOLLOWS


def test_a_round_without_overlap_waits_a_little_for_its_draft() -> None:
    script = Script(0.001, first_draft=400.0, shares_cores=True)
    played = play(script, scripted_text("good", 0), "auto", tokens=48)
    first, *others = [each for each in played.rounds if each.end_s < 0.8]
    assert first.reason.startswith("plain: the draft was not ready within")
    assert first.seconds < 4 * plain_round_s(0.001)  # work takes twice as long on shared cores
    assert {each.reason for each in others} == {"plain: the draft of an earlier round is not ready yet"}


def test_rounds_leave_without_a_draft_that_is_held_up() -> None:
    """The first forward of the draft takes 0.8 s, as long as seven rounds."""
    played = play(disturbed_case("first draft 400x", "25ms").script, scripted_text("good", 0), "auto", tokens=48)
    held_up = [each for each in played.rounds if each.end_s < 0.8]
    waited_s = sum(each.seconds - plain_round_s(0.025) for each in held_up)
    assert len(held_up) >= 5
    assert waited_s < 0.5 * plain_round_s(0.025)
    assert all(each.tokens == 1 for each in held_up)
    assert {each.reason for each in held_up} == {FIRST_FOLLOWS}
    after = [each for each in played.rounds[:-1] if each.start_s > 0.8]
    assert after
    assert all(each.sent for each in after)
