"""Nodes and client on hosts of their own: the benches' way to links that are not emulated."""

import pytest

from treeswarm.errors import BadRequest, SwarmError
from treeswarm_bench.benchmarks import wan_live as wan
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.lab import LabLink, can_make_namespaces
from treeswarm_client.cli.main import main

needs_namespaces = pytest.mark.skipif(can_make_namespaces() is not None, reason=str(can_make_namespaces()))


@needs_namespaces
async def test_a_swarm_over_real_tcp_gives_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan, "COLD_STARTS", 1)
    setup, link = BenchSetup(nodes=2, prompts=1, tokens=12), LabLink(delay_s=0.02)
    result = await wan.bench_in_lab("wan", setup, link=link, congestion="cubic", tree_size=8)
    assert result["identical"]
    assert result["lab"] == {"link": "delay=20ms", "congestion": "cubic"}
    assert len(result["rtt_ms"]) == 2
    assert all(address.startswith("10.78.0.") and rtt >= 40.0 for address, rtt in result["rtt_ms"].items())
    [first] = result["first"]
    assert first["prefill"]["ms"]["median"] >= 60.0  # client, two nodes, client
    assert all(node["frames"] > 0 for node in result["provenance"]["nodes"])


@needs_namespaces
async def test_a_client_that_fails_in_the_lab_says_why() -> None:
    setup = BenchSetup(nodes=1, prompts=1, tokens=12, draft="no-such-draft")
    with pytest.raises(SwarmError, match="no-such-draft"):
        await wan.bench_in_lab("overhead", setup, link=LabLink(), congestion=None, tree_size=8)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["exact", "--lab", "delay=1ms"], "overhead and wan"),
        (["trees", "--peers", "127.0.0.1:1"], "overhead and wan"),
        (["wan", "--lab", "25"], "is no link"),
        (["wan", "--congestion", "cubic"], "for --lab"),
    ],
)
def test_what_cannot_be_measured_in_a_lab(capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert main(["bench", *flags]) == 1
    assert words in capsys.readouterr().err


async def test_nobody_at_an_address_has_no_round_trip() -> None:
    with pytest.raises(BadRequest):
        await wan.connect_ms("nowhere")
    with pytest.raises(SwarmError, match="nobody answers"):
        await wan.connect_ms("127.0.0.1:9")
