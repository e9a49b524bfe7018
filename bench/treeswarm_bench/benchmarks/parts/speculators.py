"""`swarm bench speculators`: trained speculators side by side, on the same texts of one target.

The texts are written once, and every speculator is replayed along them (`speculators/kinds/replay.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import BadRequest
from treeswarm.identity import config_digest
from treeswarm.model_files import read_config, resolve_model
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.texts import chat_prompts, held_out_prompts, repeated_4grams
from treeswarm_bench.benchmarks.trees import LOOPING
from treeswarm_bench.speculators.kinds.replay import KnownText, Replayed, accepted_at_roots, replay, write_known_texts
from treeswarm_bench.speculators.kinds.table import TRAINED_KINDS, unrefined
from treeswarm_bench.speculators.target import TappedTarget
from treeswarm_client.drafters import load_drafter
from treeswarm_client.prompt_encoder import load_prompt_encoder
from treeswarm_client.provenance import machine_provenance
from treeswarm_node.speculator.files import read_speculator_config
from treeswarm_node.speculator.seam import Speculator

SIZES = (16, 64)
TEMPERATURES = (0.0, 1.0)
SEED = 1
# Refined and unrefined lattices are compared below every so many tokens of the texts.
EVERY = 3
DRAWS = 1000


async def bench_speculators(
    setup: BenchSetup,
    *,
    sizes: Sequence[int] = SIZES,
    temperatures: Sequence[float] = TEMPERATURES,
    chat: bool = False,
) -> dict[str, Any]:
    """Return tokens per traversal of each speculator, alone and with n-grams, and its processor time per proposal.

    `setup.speculator` names the folders, with commas between them.  Raises BadRequest and ModelError.
    """
    torch.set_num_threads(1)
    folders = [Path(name) for name in setup.speculator.split(",")]
    if setup.speculator in ("auto", "none"):
        raise BadRequest("no speculators to compare: give --speculator DIR,DIR that `swarm train-speculator` wrote")
    kinds = tuple(TRAINED_KINDS)
    taps = {read_speculator_config(folder, kinds).taps for folder in folders}
    if len(taps) > 1:
        raise BadRequest("the speculators read other blocks of the target: train them with the same --taps")
    folder = resolve_model(setup.model, weights=True)
    target = TappedTarget.load(folder, next(iter(taps)), "cpu", setup.dtype)
    encoder = load_prompt_encoder(setup.model, folder)
    prompts = chat_prompts(encoder, setup.prompts) if chat else held_out_prompts(encoder, setup.prompts)
    loaded = [_load(place, target, config_digest(read_config(folder))) for place in folders]
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for temperature in temperatures:
        settings = SamplingSettings(temperature=temperature, seed=SEED)
        texts = write_known_texts(target, prompts, setup.tokens, settings)
        rows += [_row("ngram", None, texts, size, folder, with_ngram=True) for size in sizes]
        for speculator in loaded:
            cases = [(size, ngram) for size in sizes for ngram in (False, True)]
            rows += [_row(speculator.name, speculator, texts, size, folder, with_ngram=n) for size, n in cases]
            if (plain := unrefined(speculator)) is not None:
                ratios.append(_ratio(speculator, plain, texts, sizes))
    about = machine_provenance() | setup.model_provenance() | {"dtype": setup.dtype, "speculators": setup.speculator}
    each = zip(loaded, folders, strict=True)
    agreement = {one.name: read_speculator_config(place, kinds).agreement for one, place in each}
    figures = {"rows": rows, "refined_over_unrefined": ratios, "agreement": agreement}
    return {"bench": "speculators"} | figures | {"provenance": about}


def _load(folder: Path, target: TappedTarget, digest: str) -> Speculator:
    config = read_speculator_config(folder, tuple(TRAINED_KINDS))
    if config.config_digest != digest:
        raise BadRequest(f"the speculator in '{folder}' is for another model: its config's digest differs")
    kind = TRAINED_KINDS[config.kind]
    return kind.load(folder, target.lm_head.float(), is_tied=target.is_tied, dtype=torch.float32)


def _row(
    name: str, speculator: Speculator | None, texts: Sequence[KnownText], size: int, folder: Path, *, with_ngram: bool
) -> dict[str, Any]:
    """Return the figures of one speculator with trees of one size."""
    drafter = load_drafter("ngram" if speculator is None else "tail+ngram" if with_ngram else "tail", folder)
    runs = [replay(text, drafter, size, speculator) for text in texts]
    novel = [run for run, text in zip(runs, texts, strict=True) if repeated_4grams(text.written) < LOOPING]
    proposals = sum(run.proposals for run in runs)
    return {
        "speculator": name,
        "with_ngram": with_ngram,
        "size": size,
        "temperature": texts[0].settings.temperature,
        "tokens_per_traversal": _per_traversal(runs),
        "novel_tokens_per_traversal": _per_traversal(novel) if novel else None,
        "novel_texts": len(novel),
        "processor_ms_per_proposal": 1e3 * sum(run.proposal_s for run in runs) / proposals if proposals else None,
    }


def _per_traversal(runs: Sequence[Replayed]) -> float:
    return sum(run.tokens for run in runs) / sum(run.rounds for run in runs)


def _ratio(refined: Speculator, plain: Speculator, texts: Sequence[KnownText], sizes: Sequence[int]) -> dict[str, Any]:
    """Return by how much refining raises the tokens per traversal at the same roots, with 90 % of draws of texts."""
    each = [tuple(accepted_at_roots(s, text, sizes, EVERY).sum(0) for s in (refined, plain)) for text in texts]
    sums = np.array(each, np.float64)
    draws = np.random.default_rng(SEED).integers(0, len(texts), (DRAWS, len(texts)))
    spread = np.quantile(_quotients(sums[draws].sum(1)), (0.05, 0.95), axis=0)
    columns = zip(sizes, _quotients(sums.sum(0)[None])[0].tolist(), spread.T.tolist(), strict=True)
    return {
        "speculator": refined.name,
        "temperature": texts[0].settings.temperature,
        "by_size": {str(size): {"ratio": ratio, "interval": interval} for size, ratio, interval in columns},
    }


def _quotients(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return refined over unrefined tokens, [..., sizes], of sums [..., 2, sizes]."""
    quotients: NDArray[np.float64] = sums[..., 0, :] / sums[..., 1, :]
    return quotients
