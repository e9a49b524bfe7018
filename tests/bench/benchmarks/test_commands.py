"""The command line of `swarm bench`: flags that do not fit a bench are refused, and small benches print one object."""

import argparse
import json
import sys

import pytest

from treeswarm.errors import BadRequest
from treeswarm_bench import cli, commands
from treeswarm_bench.benchmarks.parts import planner_time, ports, registry


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_command(parser.add_subparsers())
    args = parser.parse_args(["bench", *arguments])
    return int(args.run(args))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trees", "--peers", "127.0.0.1:9"], "--peers is for overhead and wan"),
        (["ports", "--peers", "127.0.0.1:9"], "--peers is for overhead and wan"),
        (["exact", "--lab", "delay=1ms"], "--lab is for overhead, wan, ports"),
        (["ports", "--beside"], "--beside is for ports with --lab"),
        (["wan", "--lab", "delay=1ms", "--beside"], "--beside is for ports with --lab"),
        (["ports", "--lab", "delay=1ms", "--congestion", "reno"], "--congestion is for overhead and wan with --lab"),
        (["exact", "--quantization", "int8"], "--quantization is for batch"),
        (["attention", "--device", "meta:nothing"], "--device meta:nothing cannot be used here"),
        (["draw"], "draw needs a file to read"),
        (["virtual-wan", "--cells", "2ms"], "unknown cell '2ms'"),
    ],
)
def test_flag_that_does_not_fit_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        run(*arguments)


def test_every_bench_has_an_example() -> None:
    assert all(f"swarm bench {name} " in commands.EXAMPLES for name in commands.BENCHES)


@pytest.mark.parametrize("name", ["node", "planner"])
def test_bench_prints_one_object_with_provenance(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planner_time, "TOKENS", 40)
    assert run(name, "--rounds", "8", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bench"] == name
    assert {"date", "machine", "versions"} <= result["provenance"].keys()


def test_profile_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("node", "--rounds", "8", "--profile", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rounds"] == 8
    assert "function calls" in printed.err


@pytest.mark.slow
def test_virtual_wan_measures_on_a_virtual_clock(capsys: pytest.CaptureFixture[str]) -> None:
    matrix = ["--cells", "1ms", "--texts", "code", "--temperatures", "0", "--strategies", "plain,star,auto"]
    assert run("virtual-wan", *matrix, "--prompts", "1", "--max-new-tokens", "8", "--swift", "2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["bench"], result["swift"], result["identical"]) == ("machines", 2.0, True)
    assert result["rows"][0]["strategies"].keys() == {"plain", "star", "auto"}


async def test_process_of_the_ports_bench_prints_its_address() -> None:
    async with ports._program([sys.executable, "-m", ports.__name__, "lend", "127.0.0.1"]) as lender:
        assert lender["address"].startswith("127.0.0.1:")


async def test_registry_bench_names_a_missing_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MOSQUITTO", None)
    with pytest.raises(BadRequest, match="apt install mosquitto"):
        await registry.bench_registry()
