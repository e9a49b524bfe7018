"""`--device-share` limits the share of the time in which forwards run."""

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
class FakeRunner:
    """Serves as a runner, and as a clock that only forwards and sleeping advance."""

    forward_s: float = 0.0
    now: float = 0.0
    sleeps: list[float] = field(default_factory=list)
    fail: bool = False

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        self.now += self.forward_s
        if self.fail:
            raise RuntimeError("out of memory")
        return [Computed()]

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@given(forward_s=st.floats(1e-6, 100.0), share=st.floats(0.05, 1.0))
def test_forwards_take_the_configured_share_of_time(forward_s: float, share: float) -> None:
    runner = FakeRunner(forward_s)
    assert len(ThrottledRunner(runner, share, runner.clock, runner.sleep).run([])) == 1
    assert forward_s / runner.now == pytest.approx(share)


def test_runner_sleeps_after_a_failed_forward_too() -> None:
    runner = FakeRunner(2.0, fail=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        ThrottledRunner(runner, 0.25, runner.clock, runner.sleep).run([])
    assert runner.sleeps == [6.0]


@pytest.mark.parametrize("share", ["0", "0.04", "1.01", "-1", "nan", "inf"])
def test_device_share_out_of_range_is_refused(share: str) -> None:
    with pytest.raises(BadRequest, match=r"--device-share .* give 0.05 to 1"):
        read_config(["demo", f"--device-share={share}"])


@pytest.mark.parametrize(("flags", "share"), [([], 1.0), (["--device-share", "0.25"], 0.25)])
def test_device_share_is_read_from_flags(flags: list[str], share: float) -> None:
    assert read_config(["demo", *flags]).device.share == share
