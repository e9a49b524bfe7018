"""What the target computes over texts, kept in memory: it reads its own texts once, and they are learned from often."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm_bench.speculators.samples import Samples
from treeswarm_bench.speculators.target import TappedTarget

BATCH = 16
"""Number of texts of a step, and of those that the target reads together."""
# Tokens of the target's distribution kept per row: in answers of SmolLM2-135M the first 64 have 0.91 of its mass.
LIKELY = 64
MOST_BYTES = 6 << 30
"""Memory for what is kept.  SmolLM2-135M takes 3.7 KB per token; texts beyond are read again for each step."""


@dataclass(frozen=True, eq=False)
class TextReading:
    """Some texts, and what the target computes over them."""

    tokens: torch.Tensor
    """Token ids, int64 [batch, n]."""
    real: torch.Tensor
    """Which of them are no padding, bool [batch, n]."""
    states: torch.Tensor
    """Results of the tapped blocks, [batch, n, taps · hidden]."""
    best: torch.Tensor
    """The target's likeliest next tokens, int64 [batch, n]."""
    likely: torch.Tensor
    """Places in the head's vocabulary of its likeliest tokens in there, int16 or int32 [batch, n, k]."""
    probabilities: torch.Tensor
    """Their shares of the mass on the head's vocabulary, [batch, n, k]."""

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(getattr(self, each.name).nbytes for each in fields(self))

    def with_noise(self, share: float, seed: int) -> "TextReading":
        """Return the reading with noise on its states, `share` of their root mean square, from a seed."""
        generator = torch.Generator(self.states.device).manual_seed(seed)
        noise = torch.randn(self.states.shape, generator=generator, device=self.states.device)
        scale = share * self.states.float().square().mean(-1, keepdim=True).sqrt()
        return replace(self, states=(self.states + scale * noise).to(self.states.dtype))


def read_texts(target: TappedTarget, vocabulary: torch.Tensor, tokens: torch.Tensor, real: torch.Tensor) -> TextReading:
    """Return what the target computes over texts, int64 [batch, n], for a head with this vocabulary, int64 [tokens]."""
    device = target.model.device
    tokens, real = tokens.to(device), real.to(device)
    states, logits = target.read(tokens)
    known = torch.softmax(logits[..., vocabulary.to(device)].float(), -1)
    probabilities, likely = known.topk(min(LIKELY, known.shape[-1]), -1)
    places = torch.int16 if len(vocabulary) < 1 << 15 else torch.int32
    return TextReading(tokens, real, states, logits.argmax(-1), likely.to(places), probabilities.to(torch.bfloat16))


@dataclass(eq=False)
class KeptReadings:
    """What the target computes over samples, read when it is first asked for and kept as far as memory is given."""

    target: TappedTarget
    vocabulary: torch.Tensor
    samples: Samples
    most_bytes: int = MOST_BYTES
    _kept: dict[int, TextReading] = field(default_factory=dict)
    _bytes: int = 0

    def groups(self) -> Iterator[TextReading]:
        """Yield the readings of all samples, BATCH at a time."""
        return (self._group(number) for number in range(-(-len(self.samples) // BATCH)))

    def of(self, indices: NDArray[np.int64]) -> TextReading:
        """Return the readings of some samples.

        The target reads BATCH neighbours together, so a text's states do not depend on the step that asks for them, and
        an interrupted training goes on alike.
        """
        lengths = self.samples.lengths[indices]
        rows = [(self._group(int(index) // BATCH), int(index) % BATCH) for index in indices]

        def stacked(name: str) -> torch.Tensor:
            parts = [getattr(reading, name)[row, :n] for (reading, row), n in zip(rows, lengths, strict=True)]
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

        return TextReading(*(stacked(each.name) for each in fields(TextReading)))

    def _group(self, number: int) -> TextReading:
        if (kept := self._kept.get(number)) is not None:
            return kept
        indices = np.arange(number * BATCH, min((number + 1) * BATCH, len(self.samples)))
        reading = read_texts(self.target, self.vocabulary, *self.samples.batch(indices))
        if self._bytes + reading.bytes <= self.most_bytes:
            self._kept[number] = reading
            self._bytes += reading.bytes
        return reading
