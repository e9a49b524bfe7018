"""`swarm serve` takes its settings from flags, environment variables and a config file, in this order."""

from pathlib import Path

import pytest

from treeswarm.errors import BadRequest
from treeswarm_client.cli.main import _parse_arguments, main


def test_flags_override_variables_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('[serve]\nmodel = "of-file"\nregistry = "10.0.0.1:4001"\nmax-waiting = 7\nlog-requests = true\n')
    monkeypatch.setenv("TREESWARM_MODEL", "of-variable")
    monkeypatch.setenv("TREESWARM_MAX_WAITING", "8")
    args = _parse_arguments(["serve", "--config", str(file), "--max-waiting", "9"])
    assert (args.model, args.registry, args.max_waiting, args.log_requests) == ("of-variable", "10.0.0.1:4001", 9, True)


def test_other_commands_ignore_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREESWARM_REGISTRY", "10.0.0.1:4001")
    monkeypatch.setenv("TREESWARM_TREE_SIZE", "3")
    args = _parse_arguments(["generate", "hello", "--model", "demo", "--peers", "127.0.0.1:1"])
    assert (args.registry, args.tree_size) == (None, "auto")


def test_wrong_setting_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('[serve]\nmodle = "demo"\n')
    monkeypatch.setenv("TREESWARM_CONFIG", str(file))
    with pytest.raises(BadRequest, match="did you mean 'model'"):
        _parse_arguments(["serve"])
    assert main(["serve"]) == 1
    assert capsys.readouterr().err.startswith(f"swarm: {file} [serve] has 'modle'")
