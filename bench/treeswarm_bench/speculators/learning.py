"""One training step of a head that goes on below its own guesses: training-time test, losses and agreement."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.session.noise import gumbel_row
from treeswarm_bench.speculators.muon import Muon
from treeswarm_bench.speculators.reads import TextReading
from treeswarm_bench.speculators.target import TappedTarget

# Number of levels below a root that the training unrolls.  Deeper ones were seen to agree as often as the third.
STEPS = 3
# Muon trains the matrices, AdamW the norms, at the rates of the bundled pair's recipe.
MUON_LR, ADAM_LR = 0.02, 4e-3
WARM_UP = 0.02
# Values of τ of which the likeliest is written into the config.
TAUS = np.geomspace(0.2, 2.0, 25)


class UnrolledHead(Protocol):
    """The weights of a head that takes its own results for states."""

    def unroll(self, states: torch.Tensor, embedded: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Return the results of some steps over whole texts, as in drafting."""
        ...

    def logits(self, result: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        """Return the scores of the token after each row's next one."""
        ...


@dataclass(eq=False)
class HeadLearner:
    """A head, its target, and the optimizers."""

    target: TappedTarget
    head: torch.nn.Module
    vocabulary: torch.Tensor
    """Token ids that the head can guess, int64 [n], rising."""

    def __post_init__(self) -> None:
        named = dict(self.head.named_parameters())
        self._matrices = {name: p for name, p in named.items() if p.ndim == 2}
        self._others = {name: p for name, p in named.items() if p.ndim != 2}
        self._muon = Muon(self._matrices.values(), lr=MUON_LR)
        self._adam = torch.optim.AdamW(self._others.values(), lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
        self._lm_head = self.target.lm_head[self.vocabulary.to(self.target.lm_head.device)].float()

    @property
    def levels(self) -> int:
        """Number of levels below a root that are learned."""
        return STEPS

    def learn(self, reading: TextReading, progress: float) -> float:
        """Make one step on some texts, and return its loss, in nats per token and level."""
        scale = min(progress / WARM_UP, (1.0 - progress) / (1.0 - WARM_UP)) if progress < 1 else 0.0
        for optimizer, peak in ((self._muon, MUON_LR), (self._adam, ADAM_LR)):
            for group in optimizer.param_groups:
                group["lr"] = peak * max(scale, 1e-3)
        loss = self.loss(reading)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        for each in (self._muon, self._adam):
            each.step()
            each.zero_grad(set_to_none=True)
        return float(loss.detach())

    def loss(self, reading: TextReading) -> torch.Tensor:
        """Return the mean cross-entropy of the head's guesses and the target's distribution, over all levels."""
        likely, probabilities = reading.likely[:, 1:].long(), reading.probabilities[:, 1:].float()
        losses = []
        for level, logits in enumerate(self._guesses(reading)):
            counted = self._counted(reading.real, level)
            logprobs = torch.log_softmax(logits, -1).gather(-1, likely)
            losses.append((-(probabilities * logprobs).sum(-1) * counted).sum() / counted.sum().clamp_min(1))
        return torch.stack(losses).mean()

    def _guesses(self, reading: TextReading) -> Iterable[torch.Tensor]:
        """Return the head's logits per level, float32 [batch, n - 1, head's vocabulary].

        Row i guesses the token after next of row i of the texts.
        """
        embedded, head = self.target.embedding[reading.tokens[:, 1:]].float(), cast(UnrolledHead, self.head)
        with self._autocast():
            results = head.unroll(reading.states[:, :-1].float(), embedded, self.levels)
            return [head.logits(result, self._lm_head).float() for result in results]

    def _autocast(self) -> AbstractContextManager[object]:
        """Let the head compute in bfloat16 where the target does.

        With it, a step takes half as long on a CPU that multiplies such matrices itself.
        """
        model = self.target.model
        return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)

    @staticmethod
    def _counted(real: torch.Tensor, level: int) -> torch.Tensor:
        """Return which rows of a level count, bool [batch, n - 1]: those below real rows of the text."""
        counted = real[:, 1:].clone()
        counted[:, :level] = False
        return counted

    @torch.no_grad()
    def agreement(self, readings: Iterable[TextReading]) -> list[float]:
        """Return the share of tokens that the head's first guess names, by level."""
        hits, rows = np.zeros(self.levels), np.zeros(self.levels)
        for reading in readings:
            for level, logits in enumerate(self._guesses(reading)):
                counted = self._counted(reading.real, level)
                guess = self.vocabulary.to(logits.device)[logits.argmax(-1)]
                hits[level] += int(((guess == reading.best[:, 1:]) & counted).sum())
                rows[level] += int(counted.sum())
        return [float(share) for share in hits / np.maximum(rows, 1)]

    @torch.no_grad()
    def fitted_taus(self, readings: Iterable[TextReading]) -> tuple[float, float]:
        """Return the τ with which the first level's scores are likeliest, for greedy and for sampling targets."""
        losses = np.zeros((2, len(TAUS)))
        ids = self.vocabulary.cpu().numpy()
        for reading in readings:
            counted = self._counted(reading.real, 0).cpu()
            guesses = next(iter(self._guesses(reading))).cpu()[counted]
            _, logits = self.target.read(reading.tokens)
            target = logits[:, 1:].float().cpu()[counted]
            noise = torch.stack([torch.from_numpy(gumbel_row(1, 0, i, target.shape[-1])) for i in range(len(target))])
            for row, (scores, answers) in enumerate(
                ((guesses, target.argmax(-1)), (guesses + noise[:, ids], (target + noise).argmax(-1)))
            ):
                place = torch.searchsorted(self.vocabulary.cpu(), answers).clamp_max(len(ids) - 1)
                known = self.vocabulary.cpu()[place] == answers
                for column, tau in enumerate(TAUS):
                    logprobs = torch.log_softmax(scores[known] / float(tau), -1)
                    losses[row, column] -= float(logprobs.gather(-1, place[known][:, None]).sum())
        greedy, sampled = (float(TAUS[i]) for i in losses.argmin(1))
        return greedy, sampled

    def extra_tensors(
        self, texts: Sequence[NDArray[np.int64]], readings: Iterable[TextReading], greedy_tau: float
    ) -> dict[str, torch.Tensor]:
        """Return what the speculator's file holds besides the weights: this kind has nothing else.

        `texts` are those that were learned from, and `readings` those held out.
        """
        return {}

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, torch.Tensor]:
        """Return weights and optimizers' states as named tensors."""
        tensors = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for name, parameter in self._matrices.items():
            if parameter in self._muon.state:
                tensors[f"muon.{name}"] = self._muon.state[parameter]["momentum"]
        for name, parameter in self._others.items():
            for key, value in self._adam.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{key}"] = value
        return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from what `state` returned."""
        self.head.load_state_dict({k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")})
        for name, parameter in self._matrices.items():
            if (momentum := tensors.get(f"muon.{name}")) is not None:
                self._muon.state[parameter]["momentum"] = momentum.to(parameter.device)
        for name, parameter in self._others.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"adam.{name}.step" in tensors:
                self._adam.state[parameter] = {key: tensors[f"adam.{name}.{key}"] for key in keys}
