"""`swarm bench rules`: what rules cost a tail per tree, beside transformers' own processors on whole rows of logits.

64 rows of a random tree below a text; repetition, presence and frequency penalty together.  The figures are
milliseconds of processor time per tree, median of calls that both ways make in turn, and their ratio.  The dense way
gets its token ids as a tensor for nothing.  `mask_ms` is what a grammar's mask costs beside, once it is computed.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from treeswarm.protocol.text_rules import Grammar, RulesRequest, TextRules
from treeswarm.session.grammars import packed_words
from treeswarm.session.logit_edits import RuledText
from treeswarm.session.paths import RowPaths
from treeswarm_client.provenance import machine_provenance
from treeswarm_node.engine.edited_logits import edited

ROWS, LENGTHS, VOCABULARIES = 64, (1_000, 8_000), (49_152, 151_936)
RULES = TextRules(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
CALLS = 15


async def bench_rules() -> dict[str, Any]:
    """Measure both ways for two lengths of the text and two vocabularies."""
    torch.set_num_threads(1)
    cases = [_measure(vocab_size, length) for vocab_size in VOCABULARIES for length in LENGTHS]
    return {"bench": "rules", "rows": ROWS, "cases": cases, "provenance": machine_provenance()}


def random_tree(vocab_size: int, length: int) -> RowPaths:
    """Return the paths of a random tree below a random text, in which words recur as in a real one."""
    random = np.random.default_rng(length)
    text = (random.pareto(0.6, length) * 50).astype(np.int64) % vocab_size
    parents = np.array([random.integers(max(-1, i - 12), i) for i in range(ROWS)], np.int64)
    tokens = random.choice(text, ROWS)
    return RowPaths(text.tolist(), length, parents, tokens, np.arange(ROWS))


@torch.inference_mode()
def _measure(vocab_size: int, length: int) -> dict[str, Any]:
    paths, logits = random_tree(vocab_size, length), torch.randn(ROWS, vocab_size)
    ruled = RuledText(RulesRequest(RULES, length // 4))
    masked = RuledText(RulesRequest(TextRules(grammar=Grammar("json_object")), 0))
    masks = np.full((ROWS, packed_words(vocab_size)), 2**32 - 1, np.uint32)
    contexts = paths.whole()
    longest = max(map(len, contexts))
    # Padding is counted in a column behind the vocabulary.
    ids = torch.tensor([context + [vocab_size] * (longest - len(context)) for context in contexts])

    def sparse() -> None:
        with edited(logits, ruled.edits(paths)):
            pass

    def mask() -> None:
        with edited(logits, masked.edits(paths, masks)):
            pass

    def dense() -> None:
        _dense(ids, logits, length // 4)

    taken: dict[str, list[float]] = {"sparse": [], "mask": [], "dense": []}
    calls: dict[str, Callable[[], None]] = {"sparse": sparse, "mask": mask, "dense": dense}
    for _ in range(CALLS):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(1e3 * (time.process_time() - start))
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    return {
        "vocabulary": vocab_size,
        "text": length,
        "distinct_tokens": len(set(contexts[-1])),
        **{f"{name}_ms": round(value, 3) for name, value in medians.items()},
        "ratio": round(medians["sparse"] / medians["dense"], 4),
    }


def _dense(ids: torch.Tensor, logits: torch.Tensor, prompt: int) -> torch.Tensor:
    """Apply the same penalties to whole rows, as servers do."""
    scores: torch.Tensor = RepetitionPenaltyLogitsProcessor(RULES.repetition_penalty)(ids, logits)
    counts = torch.zeros(len(logits), logits.shape[1] + 1)
    counts.scatter_add_(1, ids[:, prompt:], torch.ones_like(ids[:, prompt:], dtype=torch.float32))
    counts = counts[:, :-1]
    scores = scores - RULES.frequency_penalty * counts
    return scores - RULES.presence_penalty * (counts > 0)
