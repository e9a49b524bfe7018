"""An owner who lends the device for a share of the time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.errors import BadRequest
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.cli.arguments import read_config
from treeswarm_node.engine.model_runner import Computed, ThrottledRunner


@dataclass
class Hand:
    """A clock that only the device and its rests move."""

    forward_s: float = 0.0
    now: float = 0.0
    rests: list[float] = field(default_factory=list)
    fails: bool = False

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        self.now += self.forward_s
        if self.fails:
            raise RuntimeError("out of memory")
        return [Computed()]

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds


@given(forward_s=st.floats(1e-6, 100.0), share=st.floats(0.05, 1.0))
def test_the_device_is_used_for_that_share_of_the_time(forward_s: float, share: float) -> None:
    hand = Hand(forward_s)
    assert len(ThrottledRunner(hand, share, hand.clock, hand.sleep).run([])) == 1
    assert forward_s / hand.now == pytest.approx(share)


def test_a_forward_that_fails_is_rested_after_too() -> None:
    hand = Hand(2.0, fails=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        ThrottledRunner(hand, 0.25, hand.clock, hand.sleep).run([])
    assert hand.rests == [6.0]


@pytest.mark.parametrize("share", ["0", "0.04", "1.01", "-1", "nan", "inf"])
def test_what_is_no_share_is_refused(share: str) -> None:
    with pytest.raises(BadRequest, match=r"--device-share .* give 0.05 to 1"):
        read_config(["demo", f"--device-share={share}"])


@pytest.mark.parametrize(("flags", "share"), [([], 1.0), (["--device-share", "0.25"], 0.25)])
def test_the_share_is_read(flags: list[str], share: float) -> None:
    assert read_config(["demo", *flags]).device.share == share
