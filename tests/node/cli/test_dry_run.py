"""`swarm-node MODEL --dry-run` prints its report, and its exit status says whether a start would serve."""

import json
from pathlib import Path

import pytest

from treeswarm_node.cli.main import main


def test_exit_status_is_zero_for_a_model_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--dry-run", "--json", "--device", "cpu", "--memory", "1GiB"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model_type"], report["blocks"], report["can_start"]) == ("llama", 8, True)
    assert report["tested"] == {"result": "exact", "reason": ""}


def test_exit_status_is_one_for_a_model_that_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    assert main([str(tmp_path), "--dry-run", "--device", "cpu"]) == 1
    assert "does not know models of type 'never_heard_of'" in " ".join(capsys.readouterr().out.split())


def test_json_without_dry_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json"]) == 1
    assert "--json is for --dry-run" in capsys.readouterr().err
