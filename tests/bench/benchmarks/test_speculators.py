"""The bench of speculators, with heads of every kind that were never trained."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from treeswarm.errors import BadRequest
from treeswarm.identity import config_digest
from treeswarm.model_files import read_config, resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.parts.speculators import bench_speculators
from treeswarm_bench.speculators.kinds.block_heads import NGRAM_WEIGHT
from treeswarm_bench.speculators.kinds.ngram_model import TrigramModel
from treeswarm_bench.speculators.kinds.table import TRAINED_KINDS
from treeswarm_node.speculator.files import SpeculatorConfig, save_speculator

DEMO = SpeculatorConfig("mlp", "", "", 256, 4096, (5, 6, 7), 4, 2, 64, 64, window=64)


def save_untrained(folder: Path, kind: str, digest: str) -> Path:
    torch.manual_seed(1)
    config = replace(DEMO, kind=kind, config_digest=digest)
    tensors = TRAINED_KINDS[kind].make(config).state_dict()
    if kind == "lattice":
        tensors |= TrigramModel.count([np.arange(50)], 4096).tensors() | {NGRAM_WEIGHT: torch.tensor(0.5)}
    save_speculator(folder / kind, config, tensors)
    return folder / kind


@pytest.mark.slow
def test_kinds_are_compared_on_the_same_texts(tmp_path: Path) -> None:
    digest = config_digest(read_config(resolve_model("demo")))
    folders = [save_untrained(tmp_path, kind, digest) for kind in TRAINED_KINDS]
    setup = BenchSetup(prompts=2, tokens=8, speculator=",".join(map(str, folders)))
    result = asyncio.run(bench_speculators(setup, sizes=(8,)))
    rows = {(row["speculator"], row["with_ngram"], row["temperature"]): row for row in result["rows"]}
    assert set(rows) == {
        (kind, ngram, temperature)
        for kind in (*TRAINED_KINDS, "ngram")
        for ngram in (True, False)
        for temperature in (0.0, 1.0)
        if ngram or kind != "ngram"
    }
    assert all(1 <= row["tokens_per_traversal"] <= 8 for row in rows.values())
    assert all(row["processor_ms_per_proposal"] > 0 for (kind, *_), row in rows.items() if kind != "ngram")
    assert [ratio["speculator"] for ratio in result["refined_over_unrefined"]] == ["lattice", "parallel"] * 2
    assert set(result["agreement"]) == set(TRAINED_KINDS)


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no speculators to compare"):
        asyncio.run(bench_speculators(BenchSetup()))
    one, other = tmp_path / "one", tmp_path / "other"
    save_speculator(one, DEMO, {})
    save_speculator(other, replace(DEMO, taps=(1, 2)), {})
    with pytest.raises(BadRequest, match="read other blocks of the target"):
        asyncio.run(bench_speculators(BenchSetup(speculator=f"{one},{other}")))
    with pytest.raises(BadRequest, match="is for another model"):
        asyncio.run(bench_speculators(BenchSetup(speculator=str(one), prompts=1)))
