"""Rounds do not wait for a draft that a busy machine holds up, and trees come back when it is there."""

from treeswarm_bench.benchmarks.disturbed.cases import disturbed_case, plain_round_s
from treeswarm_bench.benchmarks.disturbed.play import play
from treeswarm_bench.benchmarks.disturbed.text import scripted_text


def test_rounds_leave_without_a_draft_that_is_held_up() -> None:
    """The first forward of the draft takes 0.8 s, as long as seven rounds."""
    played = play(disturbed_case("first draft 400x", "25ms").script, scripted_text("good", 0), "auto", tokens=48)
    held_up = [each for each in played.rounds if each.end_s < 0.8]
    waited_s = sum(each.seconds - plain_round_s(0.025) for each in held_up)
    assert len(held_up) >= 5
    assert waited_s < 0.5 * plain_round_s(0.025)
    assert all(each.tokens == 1 for each in held_up)
    assert "was not ready within" in held_up[0].reason
    assert {each.reason for each in held_up[1:]} == {"plain: the draft of an earlier round is not ready yet"}
    after = [each for each in played.rounds[:-1] if each.start_s > 0.8]
    assert after
    assert all(each.sent for each in after)
