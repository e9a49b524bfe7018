"""`swarm-node` reads its flags, TREESWARM_ variables, and the [node] table of a config file."""

from pathlib import Path

import pytest

from treeswarm.errors import BadRequest
from treeswarm.protocol.spans import Span
from treeswarm_node.cli.arguments import read_config
from treeswarm_node.config import (
    DeviceConfig,
    DrivingConfig,
    LendingConfig,
    ModelConfig,
    NetworkConfig,
    NodeConfig,
    NodeLimits,
    OperationsConfig,
)
from treeswarm_node.flags import parse_size
from treeswarm_node.schedule import Schedule


def test_file_variables_and_flags_result_in_one_config(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(
        '[node]\nmodel = "demo"\nblocks = "0:3"\nmemory = "2GiB"\nmax-sessions = 9\nkv_tokens = 512\nverbose = true'
    )
    config = read_config(
        ["--kv-tokens", "1024"], {"TREESWARM_CONFIG": str(file), "TREESWARM_MAX_SESSIONS": "8", "TREESWARM_PEERS": "x"}
    )
    assert (config.model.name, config.model.span, config.device.memory) == ("demo", Span(0, 3), 2 << 30)
    assert (config.limits.sessions, config.device.kv_tokens, config.operations.verbose) == (8, 1024, True)


def test_error_for_a_typo_in_the_file_names_the_nearest_flag(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('[node]\nregistri = "none"')
    with pytest.raises(BadRequest, match="did you mean 'registry'"):
        read_config(["demo", "--config", str(file)], {})


def test_sizes_with_binary_and_decimal_units() -> None:
    assert [parse_size(text) for text in ("6GiB", "500MB", "12")] == [6 << 30, 500_000_000, 12]
    with pytest.raises(BadRequest, match="is not a size"):
        parse_size("much")


def test_flags_have_the_defaults_of_the_config() -> None:
    assert read_config(["demo"], {}) == NodeConfig(ModelConfig("demo"))


def test_every_flag_reaches_its_field() -> None:
    flags = ["--revision", "v1", "--blocks", "0:3", "--num-blocks", "2", "--dtype", "auto", "--quantization", "nf4"]
    flags += ["--activations", "int8", "--device", "cuda", "--device-share", "0.5", "--memory", "6GiB"]
    flags += ["--offload", "ram", "--kv-tokens", "512", "--threads", "3", "--attention", "flash"]
    flags += ["--listen", "127.0.0.1:1", "--announce", "h:2", "--registry", "none", "--identity", "id.pem"]
    flags += ["--swarm-key", "key", "--compression", "lossless", "--bandwidth", "20mbit", "--emulate-link", "delay=1ms"]
    flags += ["--lend-ports", "1", "--lend-from", "5000", "--hours", "22:00-07:00", "--metrics", "h:3", "--no-panel"]
    flags += ["--log-format", "json", "--verbose", "--max-sessions", "9", "--grace", "1.5"]
    flags += ["--drive", "--drive-draft", "none", "--max-driven", "3"]
    assert read_config(["demo", *flags], {}) == NodeConfig(
        ModelConfig("demo", "v1", Span(0, 3), 2, "auto", "nf4", "int8"),
        DeviceConfig("cuda", 0.5, 6 << 30, "ram", 512, 3, "flash"),
        NetworkConfig("127.0.0.1:1", "h:2", "none", Path("id.pem"), Path("key"), "lossless", 20e6, "delay=1ms"),
        LendingConfig(1, 5000),
        DrivingConfig(True, "none", 3),
        OperationsConfig(Schedule.parse("22:00-07:00"), "h:3", panel=False, log_json=True, verbose=True),
        NodeLimits(sessions=9, drain_grace_s=1.5),
    )


@pytest.mark.parametrize(
    "flags",
    [["--kv-tokens", "0"], ["--threads", "-1"], ["--num-blocks", "0"], ["--lend-ports", "-1"], ["--max-driven", "0"]],
)
def test_error_for_a_wrong_number_names_its_flag(flags: list[str]) -> None:
    with pytest.raises(BadRequest, match=flags[0]):
        read_config(["demo", *flags], {})
