"""Benchmarks run nodes and a client on hosts of a lab, over links that the programs do not emulate."""

import pytest

from treeswarm.errors import BadRequest, SwarmError
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.wan import live
from treeswarm_bench.lab import LabLink, can_make_namespaces
from treeswarm_client.cli.main import main

needs_namespaces = pytest.mark.skipif(can_make_namespaces() is not None, reason=str(can_make_namespaces()))


@needs_namespaces
async def test_swarm_over_real_tcp_gives_identical_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "COLD_STARTS", 1)
    setup, link = BenchSetup(nodes=2, prompts=1, tokens=12), LabLink(delay_s=0.02)
    result = await live.bench_in_lab("wan", setup, link=link, congestion="cubic", tree_size=8)
    assert result["identical"]
    assert result["lab"] == {"link": "delay=20ms", "congestion": "cubic"}
    assert len(result["rtt_ms"]) == 2
    assert all(address.startswith("10.78.0.") and rtt >= 40.0 for address, rtt in result["rtt_ms"].items())
    [first] = result["first"]
    assert first["prefill"]["ms"]["median"] >= 60.0  # client, two nodes, client
    assert all(node["frames"] > 0 for node in result["provenance"]["nodes"])


@needs_namespaces
async def test_client_failure_in_the_lab_is_reported() -> None:
    setup = BenchSetup(nodes=1, prompts=1, tokens=12, draft="no-such-draft")
    with pytest.raises(SwarmError, match="no-such-draft"):
        await live.bench_in_lab("overhead", setup, link=LabLink(), congestion=None, tree_size=8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["exact", "--lab", "delay=1ms"], "--lab is for overhead, wan, ports"),
        (["trees", "--peers", "127.0.0.1:1"], "overhead and wan"),
        (["wan", "--lab", "25"], "is not a link"),
        (["wan", "--congestion", "cubic"], "for overhead and wan with --lab"),
    ],
)
def test_benchmarks_without_a_lab_refuse_lab_flags(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["bench", *flags]) == 1
    assert message in capsys.readouterr().err


async def test_round_trip_to_a_dead_address_is_refused() -> None:
    with pytest.raises(BadRequest):
        await live.connect_ms("nowhere")
    with pytest.raises(SwarmError, match="no node answers"):
        await live.connect_ms("127.0.0.1:9")
