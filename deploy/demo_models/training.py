"""The training loop of both models.

The schedule follows the wall clock, not the number of steps: the learning rate ends at zero on a machine of any speed,
and other work on the machine costs quality, but does not break the run.
"""

import copy
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from treeswarm_bench.speculators.muon import Muon

TOKENS_PER_STEP = 4096
SHORT, LONG = 256, 512
# The last third of a run uses longer windows, so that positions past 256 are trained.
LONG_FROM = 0.67
WARM_UP = 0.02
# Muon trains the matrices, AdamW the embeddings and norms: a run on two cores has only a few thousand steps, and
# orthogonalised steps make better use of each (Jordan et al., 2024).
MUON_LR, ADAM_LR = 0.02, 4e-3
REPORT_EVERY = 20
CHECKPOINT_EVERY_S = 240.0

Loss = Callable[[torch.Tensor], torch.Tensor]


Batches = Callable[[float], torch.Tensor]
"""Returns the next batch, int64 [batch, length + 1], given how far the run is (0 to 1)."""

# Number of tokens of a prompt from the training files, and of those that the target adds to it.
PROMPT, WRITTEN = 96, 160


def windows(tokens: np.ndarray, seed: int) -> Batches:
    """Return batches of random windows of the corpus."""
    random = np.random.default_rng(seed)

    def next_batch(progress: float) -> torch.Tensor:
        length = LONG if progress >= LONG_FROM else SHORT
        starts = random.integers(0, len(tokens) - length - 1, TOKENS_PER_STEP // length)
        return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]))

    return next_batch


def written_by(target: PreTrainedModel, tokens: np.ndarray, seed: int) -> Batches:
    """Return batches of what the target generates after windows of the corpus, greedily and by sampling in turn."""
    random = np.random.default_rng(seed)
    styles = itertools.cycle(({"do_sample": False}, {"do_sample": True, "top_k": 0}))

    def next_batch(progress: float) -> torch.Tensor:
        starts = random.integers(0, len(tokens) - PROMPT, TOKENS_PER_STEP // (PROMPT + WRITTEN))
        prompts = torch.from_numpy(np.stack([tokens[s : s + PROMPT] for s in starts]))
        length = {"min_new_tokens": WRITTEN + 1, "max_new_tokens": WRITTEN + 1}
        return target.generate(prompts, attention_mask=torch.ones_like(prompts), **length, **next(styles))

    return next_batch


def in_turn(*sources: Batches) -> Batches:
    """Return batches from each source in turn."""
    turns = itertools.cycle(sources)

    def next_batch(progress: float) -> torch.Tensor:
        return next(turns)(progress)

    return next_batch


def distilling(model: PreTrainedModel, target: PreTrainedModel) -> Loss:
    """Return a loss: the KL divergence of the model from the target at every position of a batch, in nats per token."""

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        inputs = batch[:, :-1]
        with torch.no_grad():
            target_logprobs = torch.log_softmax(target(input_ids=inputs, use_cache=False).logits, -1).flatten(0, 1)
        draft_logprobs = torch.log_softmax(model(input_ids=inputs, use_cache=False).logits, -1).flatten(0, 1)
        return torch.nn.functional.kl_div(draft_logprobs, target_logprobs, log_target=True, reduction="batchmean")

    return loss_of


def train(
    model: PreTrainedModel, next_batch: Batches, loss_of: Loss, minutes: float, save_to: Path, rate: float = 1.0
) -> None:
    """Train `model` in place for `minutes`, at `rate` times the usual learning rates; save it every few minutes."""
    start = time.monotonic()

    def progress() -> float:
        return min(1.0, (time.monotonic() - start) / (60 * minutes))

    optimizers = _optimizers(model)
    model.train()
    saved, seen = start, 0
    for step in itertools.count():
        batch = next_batch(progress())
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
    """Save a bf16 copy; training continues in float32."""
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
