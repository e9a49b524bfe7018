"""What `swarm-node` reads: its flags, TREESWARM_ variables, and the [node] table of a config file."""

from pathlib import Path

import pytest

from treeswarm.errors import BadRequest
from treeswarm.protocol.spans import Span
from treeswarm_node.cli.arguments import read_config
from treeswarm_node.flags import parse_size


def test_file_variables_and_flags_make_one_config(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(
        '[node]\nmodel = "demo"\nblocks = "0:3"\nmemory = "2GiB"\nmax-sessions = 9\nkv_tokens = 512\nverbose = true'
    )
    config = read_config(
        ["--kv-tokens", "1024"], {"TREESWARM_CONFIG": str(file), "TREESWARM_MAX_SESSIONS": "8", "TREESWARM_PEERS": "x"}
    )
    assert (config.model.name, config.model.span, config.device.memory) == ("demo", Span(0, 3), 2 << 30)
    assert (config.limits.sessions, config.device.kv_tokens, config.operations.verbose) == (8, 1024, True)


def test_a_typo_in_the_file_is_an_error_that_names_the_flag_meant(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('[node]\nregistri = "none"')
    with pytest.raises(BadRequest, match="did you mean 'registry'"):
        read_config(["demo", "--config", str(file)], {})


def test_sizes() -> None:
    assert [parse_size(text) for text in ("6GiB", "500MB", "12")] == [6 << 30, 500_000_000, 12]
    with pytest.raises(BadRequest, match="is not a size"):
        parse_size("much")
