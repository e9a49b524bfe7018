"""`swarm bench busy`: its verdict, and that its load ends with it."""

import asyncio
import subprocess

import pytest

from treeswarm_bench.benchmarks import busy
from treeswarm_bench.benchmarks.busy import Load, bench_busy, verdict


def test_runs_are_good_if_nine_in_ten_are_fast_and_none_is_slow() -> None:
    good = verdict([3.0] * 18 + [1.0, 1.0])
    assert (good["well"], good["over_2.5"], good["least"], good["median"]) == (True, 18, 1.0, 3.0)
    assert not verdict([3.0] * 17 + [1.0] * 3)["well"]
    assert not verdict([3.0] * 19 + [0.94])["well"]
    assert not verdict([3.0] * 17, failed=3)["well"]
    assert not verdict([], failed=20)["well"]


@pytest.mark.parametrize("load", busy.LOADS)
async def test_the_load_ends_with_the_runs(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(*_program: str) -> "subprocess.Popen[bytes]":
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    async def run_demo(_arguments: object) -> dict[str, object]:
        await asyncio.sleep(0.1)
        stats = {"tokens_per_second": 1.0, "traversals": 3}
        return {"ratio": 3.0, "exact": True, "plain": stats, "tree": stats}

    monkeypatch.setattr(busy, "_start", start)
    monkeypatch.setattr(busy, "_run_demo", run_demo)
    monkeypatch.setattr(busy, "PAUSE_S", (0.001, 0.002))
    result = await bench_busy("demo", runs=2, load=load, programs=2, seed=0, tokens=None)
    assert result["well"]
    assert len(result["runs"]) == 2
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)
