"""The training loop both models share.

The schedule runs on the wall clock, not on steps: a machine gives what it has, the learning
rate still ends at zero, and a busy neighbour costs quality, not a broken run.
"""

import copy
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from muon import Muon

TOKENS_PER_STEP = 4096
SHORT, LONG = 256, 512
# The last third sees longer windows, so that positions past 256 are trained ones.
LONG_FROM = 0.67
WARM_UP = 0.02
# Muon for the matrices, AdamW for embeddings and norms: a run on two cores has only some thousand
# steps, and orthogonalised steps make more of each (Jordan et al., 2024).
MUON_LR, ADAM_LR = 0.02, 4e-3
REPORT_EVERY = 20
CHECKPOINT_EVERY_S = 240.0

Loss = Callable[[torch.Tensor], torch.Tensor]


# From how far a run is (0 to 1), the next batch: int64 [batch, length + 1].
Batches = Callable[[float], torch.Tensor]

# What the target writes itself: prompts of training files, and how much it adds to each.
PROMPT, WRITTEN = 96, 160


def windows(tokens: np.ndarray, seed: int) -> Batches:
    """Random windows of the corpus."""
    random = np.random.default_rng(seed)

    def following(progress: float) -> torch.Tensor:
        length = LONG if progress >= LONG_FROM else SHORT
        starts = random.integers(0, len(tokens) - length - 1, TOKENS_PER_STEP // length)
        return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]))

    return following


def written_by(target: PreTrainedModel, tokens: np.ndarray, seed: int) -> Batches:
    """What the target writes after windows of the corpus, greedy and sampled in turn."""
    random = np.random.default_rng(seed)
    styles = itertools.cycle(({"do_sample": False}, {"do_sample": True, "top_k": 0}))

    def following(progress: float) -> torch.Tensor:
        starts = random.integers(0, len(tokens) - PROMPT, TOKENS_PER_STEP // (PROMPT + WRITTEN))
        prompts = torch.from_numpy(np.stack([tokens[s : s + PROMPT] for s in starts]))
        length = {"min_new_tokens": WRITTEN + 1, "max_new_tokens": WRITTEN + 1}
        return target.generate(prompts, attention_mask=torch.ones_like(prompts), **length, **next(styles))

    return following


def in_turn(*sources: Batches) -> Batches:
    """One batch of each, again and again."""
    turns = itertools.cycle(sources)

    def following(progress: float) -> torch.Tensor:
        return next(turns)(progress)

    return following


def distilling(model: PreTrainedModel, target: PreTrainedModel) -> Loss:
    """How far the model's whole distribution is from the target's, at every position of a batch: nats a token."""

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        inputs = batch[:, :-1]
        with torch.no_grad():
            wanted = torch.log_softmax(target(input_ids=inputs, use_cache=False).logits, -1).flatten(0, 1)
        drafted = torch.log_softmax(model(input_ids=inputs, use_cache=False).logits, -1).flatten(0, 1)
        return torch.nn.functional.kl_div(drafted, wanted, log_target=True, reduction="batchmean")

    return loss_of


def train(
    model: PreTrainedModel, following: Batches, loss_of: Loss, minutes: float, save_to: Path, rate: float = 1.0
) -> None:
    """Train `model` in place for `minutes`, at `rate` of the usual learning rates; saved every few minutes."""
    start = time.monotonic()

    def progress() -> float:
        return min(1.0, (time.monotonic() - start) / (60 * minutes))

    optimizers = _optimizers(model)
    model.train()
    saved, seen = start, 0
    for step in itertools.count():
        batch = following(progress())
        _set_learning_rates(optimizers, rate, progress())
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += batch.numel() - len(batch)
        if step % REPORT_EVERY == 0:
            spent = time.monotonic() - start
            print(
                f"{spent / 60:6.1f} min  step {step:5d}  {seen / 1e6:6.2f} M tokens  loss {loss.item():.3f}", flush=True
            )
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            save(model, save_to)
            saved = time.monotonic()
        if progress() >= 1.0:
            break
    model.eval()
    save(model, save_to)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a bf16 copy; training goes on in float32."""
    copied = copy.deepcopy(model).to(torch.bfloat16)
    copied.tie_weights()
    copied.save_pretrained(folder)


def _optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=MUON_LR),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _set_learning_rates(optimizers: list[torch.optim.Optimizer], rate: float, progress: float) -> None:
    scale = rate * min(progress / WARM_UP, (1.0 - progress) / (1.0 - WARM_UP)) if progress < 1 else 0.0
    for optimizer, peak in zip(optimizers, (MUON_LR, ADAM_LR), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * max(scale, 1e-3)
