"""One forward on the device: steps in, activations or tokens out.  Runs in the device thread."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import ProtocolError, Refused
from treeswarm.messages import FaultCode
from treeswarm.session import incoming_rows
from treeswarm_node.activations import Native, RowCodec
from treeswarm_node.batch import Segment
from treeswarm_node.sampler import Sampler, best_tokens
from treeswarm_node.span_model import SpanModel


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


class Runs(Protocol):
    """What an engine needs of a device."""

    def run(self, segments: Sequence[Segment]) -> list[Computed]: ...


@dataclass(frozen=True)
class Lent:
    """A device that its owner lends for a share of the time: after each forward it rests, so that somebody else's work
    has the rest of it.  The rest counts as computing: that is what whoever waits for this node must reckon with."""

    device: Runs
    share: float
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        start = self.clock()
        try:
            return self.device.run(segments)
        finally:
            # One that failed took the device as well.
            self.sleep((self.clock() - start) * (1.0 / self.share - 1.0))


class Device:
    """The model and its sampler, behind one synchronous verb."""

    def __init__(self, model: SpanModel, sampler: Sampler, codec: RowCodec | None = None) -> None:
        self._model = model
        self._codec = codec or Native(model.hidden_size)
        self._sampler = sampler

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        """Compute every segment's step in one forward; a segment with activations that are not finite gets an
        error, and so do later ones of its session; the others get their results."""
        inputs = [self._input(segment) for segment in segments]
        for segment, rows in zip(segments, inputs, strict=True):
            segment.kv.spoilt |= not bool(torch.isfinite(rows).all())
        good = [i for i, segment in enumerate(segments) if not segment.kv.spoilt]
        outputs = self._forward([segments[i] for i in good], [inputs[i] for i in good])
        not_finite = Refused("activations from upstream are not finite", FaultCode.NOT_FINITE)
        results = [Computed(error=not_finite)] * len(segments)
        for i, output in zip(good, outputs, strict=True):
            results[i] = self._result(segments[i], output)
        return results

    def _input(self, segment: Segment) -> torch.Tensor:
        step = segment.step
        if segment.span.start == 0:
            return self._model.embed(torch.from_numpy(step.tokens).to(self._model.device))
        rows = self._codec.unpack(step.append.hidden, self._model.dtype)
        if len(rows) != step.rows:
            rows = rows[torch.from_numpy(incoming_rows(step))]
        return rows.to(self._model.device)

    def _forward(self, segments: list[Segment], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if not segments:
            return []
        hidden = self._model.forward(segments, torch.cat(inputs))
        return list(torch.split(hidden, [segment.step.rows for segment in segments]))

    def _result(self, segment: Segment, hidden: torch.Tensor) -> Computed:
        if segment.span.end < self._model.blocks:
            return Computed(hidden=self._codec.pack(hidden))
        step = segment.step
        logits = self._model.logits(hidden[torch.from_numpy(step.answered)])
        try:
            tokens, logprobs = self._sampler.choose(logits, step.positions[step.answered] + 1, step.append.settings)
        except Refused as error:
            return Computed(error=error)
        alternatives = best_tokens(logits, step.alternatives) if step.alternatives else None
        return Computed(tokens=tokens, logprobs=logprobs, alternatives=alternatives)
