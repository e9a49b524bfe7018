"""Load a checkpoint as a node does, in three spans, and compare its texts with those of stock transformers."""

import json
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from tests.families.checkpoint import write_checkpoint
from tests.families.configs import LAYERS, VOCAB
from tests.node.conftest import SpanChain, append_of
from tests.support.texts import Text
from treeswarm.errors import SwarmError
from treeswarm.protocol.spans import Span
from treeswarm_node.config import DeviceConfig, ModelConfig, NodeConfig
from treeswarm_node.engine import loaded_stage

SPANS = (Span(0, 2), Span(2, 4), Span(4, LAYERS))
# Largest accepted difference of logits, relative to the largest logit.  Exact types differ by 2e-5 at most.
TOLERANCE = 1e-4
# The same for types that magnify rounding.  Stock logits of Muse Spark differ by up to 8e-5 between one forward and a
# KV cache, and by up to 7e-5 between eager and fused attention (four random texts of 90 tokens, 2026-11-30).
TOLERANCES = {"muse_spark": 3e-4}
# The last token of the vocabulary stands for an image or a sound in wrappers, so texts do not contain it.
TEXT_VOCAB = VOCAB - 1
# The long prompt is longer than every window and chunk of the tiny configs; both are prefilled in chunks.
PROMPTS = {"short": 9, "long": 61}
PREFILL_ROWS = 29
TREES, TREE_ROWS, GREEDY_TOKENS = 3, 8, 24
KV_TOKENS = 1024


@dataclass(frozen=True)
class Verdict:
    """Says how a checkpoint fared."""

    result: str
    """`exact`, `wrong`, `refused`, `crash`, or `not built` if transformers could not make or load the checkpoint."""
    detail: str
    """Differences, or the message of the error."""

    def __str__(self) -> str:
        return f"{self.result}: {self.detail}"


def judge(case: str) -> Verdict:
    """Write the tiny checkpoint of a type or form, run it as nodes do, and compare it with stock transformers."""
    with tempfile.TemporaryDirectory(prefix="families") as name:
        folder = Path(name) / case
        try:
            write_checkpoint(case, folder)
            stock = load_stock(folder)
        except Exception as error:  # Whatever transformers raises, there is nothing to compare with.
            return Verdict("not built", f"{type(error).__name__}: {_first_line(error)}")
        try:
            chain = load_chain(folder)
        except SwarmError as error:
            return Verdict("refused", _first_line(error))
        except Exception as error:  # Any other error is the crash that this looks for.
            return Verdict("crash", _describe(error))
        try:
            return compare(stock, chain, TOLERANCES.get(case, TOLERANCE))
        except Exception as error:
            return Verdict("crash", f"while serving, {_describe(error)}")


def load_stock(folder: Path) -> PreTrainedModel:
    """Load the checkpoint with nothing but transformers, as the class that saved it: of a wrapper its own."""
    (name,) = json.loads((folder / "config.json").read_text("utf-8"))["architectures"]
    model: PreTrainedModel = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def load_chain(folder: Path) -> SpanChain:
    """Load three spans of the checkpoint as three nodes do, with their checks."""
    config = NodeConfig(
        ModelConfig(str(folder), dtype="float32", quantization="none", activations="native"),
        DeviceConfig("cpu", kv_tokens=KV_TOKENS),
    )
    model = loaded_stage.ModelInfo.find(str(folder))
    return SpanChain([loaded_stage._load(config, model, span, None, None, None)[0] for span in SPANS])


@torch.inference_mode()
def compare(stock: PreTrainedModel, chain: SpanChain, tolerance: float) -> Verdict:
    """Run two sessions in each batch: chunked prefill, committed trees, then greedy tokens one by one."""
    random = np.random.default_rng(1)
    texts = {name: Text(random.integers(3, TEXT_VOCAB, n).tolist(), random, TEXT_VOCAB) for name, n in PROMPTS.items()}
    for name, text in texts.items():
        chain.open(name, trunk_room=len(text.trunk) + TREES * TREE_ROWS + GREEDY_TOKENS)
    prefills = {name: text.prefill(PREFILL_ROWS) for name, text in texts.items()}
    for i in range(max(map(len, prefills.values()))):
        chain.run({name: appends[i] for name, appends in prefills.items() if i < len(appends)})
    worst, agreeing = 0.0, 0
    commits: dict[str, list[int]] = {name: [] for name in texts}
    for _ in range(TREES):
        trees = {name: text.tree(TREE_ROWS, commits[name]) for name, text in texts.items()}
        logits = chain.run({name: append for name, (append, _) in trees.items()})
        for name, (_, ids) in trees.items():
            expected = _stock_rows(stock, texts[name], ids)
            worst = max(worst, float((logits[name] - expected).abs().max() / expected.abs().max()))
            agreeing += int((logits[name].argmax(-1) == expected.argmax(-1)).sum())
            commits[name] = [i for i in texts[name].path(int(random.choice(ids))) if i in ids]
    greedy = _greedy_agreement(stock, chain, texts["long"], commits["long"])
    rows = TREES * TREE_ROWS * len(PROMPTS)
    exact = worst < tolerance and greedy == GREEDY_TOKENS
    detail = f"worst {worst:.1e}, argmax {agreeing}/{rows}, greedy {greedy}/{GREEDY_TOKENS}"
    return Verdict("exact" if exact else "wrong", detail)


def _stock_rows(stock: PreTrainedModel, text: Text, ids: list[int]) -> torch.Tensor:
    """Return the stock logits [rows, vocab] of a tree's rows; every leaf's path is one forward."""
    inner = {text.parents[i] for i in ids}
    rows: dict[int, torch.Tensor] = {}
    for leaf in (i for i in ids if i not in inner):
        path = text.path(leaf)
        logits = _stock_logits(stock, [text.tokens[i] for i in path])
        rows.update(dict(zip(path, logits, strict=True)))
    return torch.stack([rows[i] for i in ids])


def _stock_logits(stock: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = stock(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    return logits


def _greedy_agreement(stock: PreTrainedModel, chain: SpanChain, text: Text, commit: list[int]) -> int:
    """Decode greedily token by token, and return how many tokens stock transformers would have chosen too."""
    text.trunk += commit
    first = len(text.path(text.trunk[-1]))
    token, tip, chosen = int(text.random.integers(3, TEXT_VOCAB)), text.trunk[-1], []
    tokens = [text.tokens[i] for i in text.path(tip)]
    for count in range(GREEDY_TOKENS):
        node, text.next_id = text.next_id, text.next_id + 1
        append = append_of(text._next_seq(), node, [tip], [token], commit=commit if count == 0 else [tip])
        tokens.append(token)
        token, tip = int(chain.run({"long": append})["long"][0].argmax()), node
        chosen.append(token)
    expected = _stock_logits(stock, tokens)[first:].argmax(-1).tolist()
    return sum(a == b for a, b in zip(chosen, expected, strict=True))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _describe(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_first_line(error)} ({Path(frame.filename).name}:{frame.lineno} in {frame.name})"
