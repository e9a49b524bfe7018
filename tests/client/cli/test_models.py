"""`swarm models` shows each version of each model with its gaps, context and room."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.client.discovery.test_overview import BFLOAT16, MODEL, OTHER, record

from treeswarm.errors import ModelError
from treeswarm.identity import config_digest
from treeswarm.model_files import read_config, resolve_model
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.protocol.spans import Span
from treeswarm_client.cli.models import context_length_of
from treeswarm_client.cli.render.models_table import Room, models_as_dict, render_models, room_of
from treeswarm_client.discovery.overview import ModelView, Overview, Probe, make_overview

INT8 = NumericsClass("02" * 32, "bfloat16", "int8")


def draw(overview: Overview, contexts: dict[str, int]) -> str:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as captured:
        console.print(*render_models(overview, contexts), sep="\n")
    return captured.get()


def overview_of(*records: NodeRecord, silent: tuple[int, ...] = ()) -> Overview:
    probes: dict[str, Any] = {record.node: Probe(0.01) for record in records}
    probes |= {records[number].node: Probe(None, "silent") for number in silent}
    return make_overview(records, probes)


def test_room_is_that_of_the_block_with_the_least() -> None:
    overview = overview_of(
        record(1, Span(0, 8), free_tokens=100, total_tokens=1000),
        record(2, Span(0, 4), free_tokens=70, total_tokens=500),
        record(3, Span(4, 8), free_tokens=20, total_tokens=700),
        record(4, Span(0, 8), free_tokens=9000, total_tokens=9000, state=NodeState.PAUSED),
        record(5, Span(0, 8), free_tokens=9000, total_tokens=9000),
        silent=(4,),
    )
    ((served,),) = (model.classes for model in overview.models)
    assert room_of(served) == Room(120, 1500)
    assert models_as_dict(overview, {})["models"][0]["classes"][0]["nodes"] == 3


def test_every_version_of_a_model_has_a_line() -> None:
    overview = overview_of(
        record(1, Span(0, 8)),
        record(2, Span(0, 3), numerics=INT8),
        record(3, Span(5, 8), numerics=INT8),
        record(4, Span(0, 2), model=OTHER, name="org/other\x1b[2J", numerics=BFLOAT16, blocks=2),
    )
    lines = draw(overview, {MODEL: 4096}).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["demo", "8", "complete", "float32", "none", "1", "4096", "2048", "of", "8192"],
        ["demo", "8", "missing", "3:5", "bfloat16", "int8", "2", "4096", "0", "of", "0"],
        ["org/other?[2J", "2", "complete", "bfloat16", "none", "1", "-", "2048", "of", "8192"],
    ]
    models = json.loads(json.dumps(models_as_dict(overview, {MODEL: 4096})))["models"]
    assert [(model["name"], model["covered"], model["context_tokens"]) for model in models] == [
        ("demo", True, 4096),
        ("org/other?[2J", True, None),
    ]
    assert [served["gaps"] for served in models[0]["classes"]] == [[], ["3:5"]]


def test_missing_nodes_and_gaps_get_a_next_step() -> None:
    assert "swarm-node MODEL" in draw(Overview(()), {})
    assert "swarm status" in draw(overview_of(record(1, Span(0, 3))), {})


def test_context_is_known_if_the_config_is_that_of_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = config_digest(read_config(resolve_model("demo")))
    assert context_length_of(ModelView("demo", digest, 8, ())) == 2048
    assert context_length_of(ModelView("demo", OTHER, 8, ())) is None
    # A name that a node announces opens no directory.
    (tmp_path / "here").symlink_to(resolve_model("demo"))
    monkeypatch.chdir(tmp_path)
    for name in ("here", "./here", str(tmp_path / "here")):
        assert context_length_of(ModelView(name, digest, 8, ())) is None


def test_unknown_model_error_suggests_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Llama-3-8B").mkdir()
    (tmp_path / "Llama-3-8B" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for wrong, meant in (("dmeo", "demo"), ("./Llama3-8B", "Llama-3-8B"), (f"{tmp_path}/Llama-38B", "Llama-3-8B")):
        with pytest.raises(ModelError, match=f"did you mean '[^']*{meant}'"):
            resolve_model(wrong)
    with pytest.raises(ModelError, match="there is no model 'qqqqqqqq': give"):
        resolve_model("qqqqqqqq")
