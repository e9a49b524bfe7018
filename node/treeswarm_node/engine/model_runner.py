"""One forward on the device: steps in, activations or tokens out.  Runner in the device thread."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import ProtocolError, Refused
from treeswarm.protocol.messages import FaultCode
from treeswarm.session.session import incoming_rows
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.engine.activation_codec import NativeCodec, RowCodec
from treeswarm_node.engine.sampler import Sampler, best_tokens
from treeswarm_node.model.span_model import SpanModel

# The LM head is larger than many a block: it is read once for all sessions of a forward, up to so many rows.  Beyond
# them it is bound by its products, and a vocabulary of float32 for each row by memory.
HEAD_ROWS = 256


@dataclass(frozen=True, eq=False)
class Computed:
    """What became of one step.  `error` set: nothing else holds."""

    hidden: bytes = b""
    """Activations of the step's rows as they travel; empty from the tail."""
    tokens: NDArray[np.int64] | None = None
    logprobs: NDArray[np.float32] | None = None
    alternatives: NDArray[np.int64] | None = None
    """[answered, k], where the session asked for them."""
    error: ProtocolError | None = None


class Runner(Protocol):
    """What an engine needs of a device."""

    def run(self, segments: Sequence[Segment]) -> list[Computed]: ...


@dataclass(frozen=True)
class ThrottledRunner:
    """A device that its owner lends for a share of the time: after each forward it rests, so that somebody else's work
    has the rest of it.  The rest counts as computing: that is what whoever waits for this node must reckon with."""

    runner: Runner
    share: float
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        start = self.clock()
        try:
            return self.runner.run(segments)
        finally:
            # One that failed took the device as well.
            self.sleep((self.clock() - start) * (1.0 / self.share - 1.0))


class ModelRunner:
    """The model and its sampler, behind one synchronous verb."""

    def __init__(self, model: SpanModel, sampler: Sampler, codec: RowCodec | None = None) -> None:
        self._model = model
        self._codec = codec or NativeCodec(model.hidden_size)
        self._sampler = sampler

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        """Compute every segment's step in one forward; a segment with activations that are not finite gets an
        error, and so do later ones of its session; the others get their results."""
        inputs = [self._input(segment) for segment in segments]
        for segment, rows in zip(segments, inputs, strict=True):
            segment.kv.invalid |= not bool(torch.isfinite(rows).all())
        good = [i for i, segment in enumerate(segments) if not segment.kv.invalid]
        outputs = self._forward([segments[i] for i in good], [inputs[i] for i in good])
        not_finite = Refused("activations from upstream are not finite", FaultCode.NOT_FINITE)
        results = [Computed(error=not_finite)] * len(segments)
        computed = self._results([segments[i] for i in good], outputs)
        for i, result in zip(good, computed, strict=True):
            results[i] = result
        return results

    def _input(self, segment: Segment) -> torch.Tensor:
        step = segment.step
        if segment.span.start == 0:
            return self._model.embed(torch.from_numpy(step.tokens).to(self._model.device))
        rows = self._codec.decode(step.append.hidden, self._model.dtype)
        if len(rows) != step.rows:
            rows = rows[torch.from_numpy(incoming_rows(step))]
        return rows.to(self._model.device)

    def _forward(self, segments: list[Segment], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if not segments:
            return []
        hidden = self._model.forward(segments, torch.cat(inputs))
        return list(torch.split(hidden, [segment.step.rows for segment in segments]))

    def _results(self, segments: list[Segment], outputs: list[torch.Tensor]) -> list[Computed]:
        """All segments of a forward run the same blocks."""
        if not segments:
            return []
        if segments[0].span.end < self._model.blocks:
            return [Computed(hidden=self._codec.encode(hidden)) for hidden in outputs]
        answered = [hidden[torch.from_numpy(s.step.answered)] for s, hidden in zip(segments, outputs, strict=True)]
        results = []
        for some in _together([len(rows) for rows in answered], HEAD_ROWS):
            logits = self._model.logits(torch.cat(answered[some]))
            each = torch.split(logits, [len(rows) for rows in answered[some]])
            results += [self._chosen(segment, rows) for segment, rows in zip(segments[some], each, strict=True)]
        return results

    def _chosen(self, segment: Segment, logits: torch.Tensor) -> Computed:
        step = segment.step
        try:
            tokens, logprobs = self._sampler.choose(logits, step.positions[step.answered] + 1, step.append.settings)
        except Refused as error:
            return Computed(error=error)
        alternatives = best_tokens(logits, step.alternatives) if step.alternatives else None
        return Computed(tokens=tokens, logprobs=logprobs, alternatives=alternatives)


def _together(rows: Sequence[int], most: int) -> list[slice]:
    """Neighbours in runs of at most `most` rows; whoever has more is alone."""
    runs: list[slice] = []
    held = 0
    for index, count in enumerate(rows):
        if runs and held + count <= most:
            runs[-1], held = slice(runs[-1].start, index + 1), held + count
        else:
            runs.append(slice(index, index + 1))
            held = count
    return runs
