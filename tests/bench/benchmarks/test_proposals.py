"""The bench of proposals, with a head that was never trained: the texts are exact all the same."""

import asyncio
from pathlib import Path

import pytest
import torch
from tests.support.eagle3_heads import FLAT, NESTED, HeadFiles

from treeswarm.identity import config_digest
from treeswarm.model_files import read_config, resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.proposals import bench_proposals
from treeswarm_bench.benchmarks.wan.virtual import HOP_S
from treeswarm_node.speculator.autoregressive import head_shape
from treeswarm_node.speculator.files import SpeculatorConfig, save_speculator
from treeswarm_node.speculator.head import SpeculatorHead


@pytest.mark.slow
def test_texts_are_exact_with_an_untrained_head(tmp_path: Path) -> None:
    digest = config_digest(read_config(resolve_model("demo")))
    config = SpeculatorConfig("autoregressive", digest, "", 256, 4096, (5, 6, 7), 4, 2, 64, 64, window=64)
    torch.manual_seed(1)
    save_speculator(tmp_path, config, SpeculatorHead(head_shape(config)).state_dict())
    setup = BenchSetup(draft="none", nodes=2, prompts=1, tokens=12, speculator=str(tmp_path))
    result = asyncio.run(bench_proposals(setup, sizes=(8,), flat_ms=10.0))
    assert result["mismatches"] == 0
    assert [(row["temperature"], row["draft"], row["size"]) for row in result["rows"]] == [
        case
        for temperature in (0.0, 1.0)
        for case in (
            (temperature, "plain", 0),
            *((temperature, draft, size) for draft in ("tail", "tail+ngram", "ngram") for size in (8, "auto")),
        )
    ]
    # Three links of 25 ms and what a message takes besides, and two nodes of 10 ms; the prompt's rows take longer.
    rate = next(row["tokens_per_s"] for row in result["rows"] if row["draft"] == "plain")
    fastest = 1 / (3 * (0.025 + HOP_S) + 2 * 0.010)
    assert 0.9 * fastest < rate < fastest


@pytest.mark.slow
@pytest.mark.parametrize("form", [FLAT, NESTED])
def test_texts_are_exact_with_a_published_head(form: str, tmp_path: Path) -> None:
    head = HeadFiles(
        hidden=256, target_hidden=256, vocab=4096, head_dim=64, intermediate=64, draft_vocab=512, tap_ids=(6, 7, 8)
    ).with_flags("norm_before_residual", "fc_norm", "norm_output")
    setup = BenchSetup(draft="none", nodes=2, prompts=1, tokens=12, speculator=str(head.write(tmp_path, form)))
    result = asyncio.run(bench_proposals(setup, sizes=(8,)))
    assert result["mismatches"] == 0
    assert len(result["rows"]) == 14
