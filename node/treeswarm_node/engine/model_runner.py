"""Run one forward of the model: steps in, activations or tokens out.

The engine calls the runner in its device thread.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import ProtocolError, Refused
from treeswarm.protocol.messages import FaultCode, ScoredRows
from treeswarm.protocol.tap_sums import TapSums
from treeswarm.session.session import incoming_rows
from treeswarm.session.steps import Step
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.engine.activation_codec import NativeCodec, RowCodec
from treeswarm_node.engine.sampler import Sampler, best_logprobs, best_tokens
from treeswarm_node.engine.tap_slice import TapSlice, add_taps
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.model.taps import Taps

# The LM head is larger than many blocks: its weights are read once for all sessions of a forward, for up to this many
# rows.  With more rows the head is bound by its products, and logits in float32 for each row take much memory.
HEAD_ROWS = 256


@dataclass(frozen=True, eq=False)
class Computed:
    """Holds the result of one step.  If `error` is set, no other field is."""

    hidden: bytes = b""
    """Activations of the step's rows, encoded for the link; empty at the tail."""
    tokens: NDArray[np.int64] | None = None
    """Tokens chosen at the tail, int64 [answered]; None at other nodes."""
    logprobs: NDArray[np.float32] | None = None
    """Log-probabilities of `tokens` under the model's own distribution, float32 [answered]."""
    alternatives: NDArray[np.int64] | None = None
    """Most likely tokens, int64 [answered, k], or None if the session did not ask for them."""
    alternative_logprobs: NDArray[np.float32] | None = None
    """Log-probabilities of these, float32 [answered, k], or None if the session did not ask for them."""
    scored: ScoredRows | None = None
    """Log-probabilities of the tokens that the append named, or None if it named none."""
    states: torch.Tensor | None = None
    """Results of the tapped blocks of its span, [rows, taps · hidden], or None if the segment does not speculate."""
    tap_sums: TapSums | None = None
    """Sums of taps for the next node, or None if no row has one."""
    error: ProtocolError | None = None


class Runner(Protocol):
    """Runs forwards for an engine."""

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        """Compute every segment's step in one forward, and return the results in the same order."""
        ...


@dataclass(frozen=True)
class ThrottledRunner:
    """Runs forwards for a share of the time, and sleeps for the rest so that other programs can use the device.

    The sleep counts as compute time, because clients that wait for this node must plan with it.
    """

    runner: Runner
    share: float
    """Share of the time in which forwards may run, more than 0 and at most 1."""
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        start = self.clock()
        try:
            return self.runner.run(segments)
        finally:
            # A forward that failed has used the device as well.
            self.sleep((self.clock() - start) * (1.0 / self.share - 1.0))


class ModelRunner:
    """Runs forwards on the model, and the sampler on the tail's logits."""

    def __init__(
        self,
        model: SpanModel,
        sampler: Sampler,
        codec: RowCodec | None = None,
        taps: Sequence[int] = (),
        tap_slice: TapSlice | None = None,
    ) -> None:
        """`taps` are the blocks whose results segments that speculate get, or add to sums with `tap_slice`."""
        self._model = model
        self._taps = taps
        self._tap_slice = tap_slice
        self._codec = codec or NativeCodec(model.hidden_size)
        self._sampler = sampler

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        """Compute every segment's step in one forward, and return the results in the same order.

        A segment whose activations are not finite gets an error, and so do later ones of its session.  The other
        segments get their results.
        """
        inputs = [self._input(segment) for segment in segments]
        for segment, rows in zip(segments, inputs, strict=True):
            segment.kv.invalid |= not bool(torch.isfinite(rows).all())
        valid = [i for i, segment in enumerate(segments) if not segment.kv.invalid]
        taps = self._needed_taps([segments[i] for i in valid])
        outputs = self._forward([segments[i] for i in valid], [inputs[i] for i in valid], taps)
        not_finite = Refused("activations from upstream are not finite", FaultCode.NOT_FINITE)
        results = [Computed(error=not_finite)] * len(segments)
        computed = self._results([segments[i] for i in valid], outputs)
        states = self._states([segments[i] for i in valid], taps)
        for i, result, tapped in zip(valid, computed, states, strict=True):
            results[i] = self._with_taps(segments[i], result, tapped, taps)
        return results

    def _input(self, segment: Segment) -> torch.Tensor:
        """Return the activations [rows, hidden] that the segment's first block takes."""
        step = segment.step
        if segment.span.start == 0:
            tokens, positions = (
                torch.from_numpy(rows).to(self._model.device) for rows in (step.tokens, step.positions)
            )
            return self._model.embed(tokens, positions)
        rows = self._codec.decode(step.append.hidden, self._model.dtype)
        if len(rows) != step.rows:
            rows = rows[torch.from_numpy(incoming_rows(step))]
        return rows.to(self._model.device)

    def _forward(self, segments: list[Segment], inputs: list[torch.Tensor], taps: Taps | None) -> list[torch.Tensor]:
        if not segments:
            return []
        hidden = self._model.forward(segments, torch.cat(inputs), taps)
        return list(torch.split(hidden, [segment.step.rows for segment in segments]))

    def _needed_taps(self, segments: list[Segment]) -> Taps | None:
        """Return the taps of a forward, or None if no segment needs any.  All segments run the same blocks."""
        if not any(segment.step.rows and (segment.speculates or segment.sums_from is not None) for segment in segments):
            return None
        span = segments[0].span
        return Taps([tap for tap in self._taps if span.start <= tap < span.end])

    def _states(self, segments: list[Segment], taps: Taps | None) -> Sequence[torch.Tensor]:
        """Return the tapped rows of each segment, which are empty where no block was tapped."""
        rows = [segment.step.rows for segment in segments]
        if taps is None or not taps.blocks:
            return [torch.empty(count, 0, device=self._model.device) for count in rows]
        return torch.split(taps.states(), rows)

    def _with_taps(self, segment: Segment, result: Computed, states: torch.Tensor, taps: Taps | None) -> Computed:
        """Return a segment's result with what its taps are for."""
        if taps is None:
            return result
        if segment.speculates:
            # A clone, because a part of the batch would keep the rows of all sessions.
            return replace(result, states=states.clone())
        if segment.sums_from is None or self._tap_slice is None:
            return result
        sums = add_taps(self._tap_slice, segment.step, states, taps.blocks, segment.sums_from)
        return replace(result, tap_sums=sums)

    def _results(self, segments: list[Segment], outputs: list[torch.Tensor]) -> list[Computed]:
        """Encode the outputs, or sample from them if the span ends with the last block.

        All segments of a forward run the same blocks.
        """
        if not segments:
            return []
        if segments[0].span.end < self._model.blocks:
            return [Computed(hidden=self._codec.encode(hidden)) for hidden in outputs]
        answered = [
            hidden[torch.from_numpy(segment.step.answered)] for segment, hidden in zip(segments, outputs, strict=True)
        ]
        results = []
        for group in _group_rows([len(rows) for rows in answered], HEAD_ROWS):
            logits = self._model.logits(torch.cat(answered[group]))
            logits_by_segment = torch.split(logits, [len(rows) for rows in answered[group]])
            results += [
                self._sample(segment, rows) for segment, rows in zip(segments[group], logits_by_segment, strict=True)
            ]
        for i, (segment, hidden) in enumerate(zip(segments, outputs, strict=True)):
            if len(segment.step.append.scored) and results[i].error is None:
                results[i] = replace(results[i], scored=self._score(segment.step, hidden))
        return results

    def _score(self, step: Step, hidden: torch.Tensor) -> ScoredRows:
        """Return the log-probabilities of the tokens that a prompt's append names, as many rows at once as the head
        takes."""
        tokens = step.append.scored.astype(np.int64)
        parts = []
        for start in range(0, len(tokens), HEAD_ROWS):
            logits = self._model.logits(hidden[start : min(start + HEAD_ROWS, len(tokens))])
            parts.append(score_rows(logits, tokens[start : start + HEAD_ROWS], step.alternatives))
        return ScoredRows(
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.alternatives for part in parts]),
            np.concatenate([part.alternative_logprobs for part in parts]),
        )

    def _sample(self, segment: Segment, logits: torch.Tensor) -> Computed:
        step = segment.step
        # Before rules and filters: these are the model's own.
        alternatives = best_tokens(logits, step.alternatives) if step.alternatives else None
        alternative_logprobs = None
        if alternatives is not None and step.alternative_logprobs:
            alternative_logprobs = best_logprobs(logits, alternatives)
        try:
            edits = None if segment.rules is None or not len(step.answered) else segment.rules.edits(step)
            positions = step.positions[step.answered] + 1
            tokens, logprobs = self._sampler.choose(logits, positions, step.append.settings, edits)
        except Refused as error:
            return Computed(error=error)
        return Computed(
            tokens=tokens, logprobs=logprobs, alternatives=alternatives, alternative_logprobs=alternative_logprobs
        )


def score_rows(logits: torch.Tensor, tokens: NDArray[np.int64], alternatives: int) -> ScoredRows:
    """Return the log-probability of a token after each row, and of the best `alternatives` tokens there.

    `logits` are float32 [n, vocab], `tokens` int64 [n].
    """
    logprobs = best_logprobs(logits, tokens[:, None])[:, 0]
    if not alternatives:
        return ScoredRows(logprobs)
    best = best_tokens(logits, alternatives)
    return ScoredRows(logprobs, best.astype(np.uint32), best_logprobs(logits, best))


def _group_rows(rows: Sequence[int], max_rows: int) -> list[slice]:
    """Return slices of neighbours with at most `max_rows` rows together; an item with more rows is on its own."""
    groups: list[slice] = []
    grouped_rows = 0
    for index, count in enumerate(rows):
        if groups and grouped_rows + count <= max_rows:
            groups[-1], grouped_rows = slice(groups[-1].start, index + 1), grouped_rows + count
        else:
            groups.append(slice(index, index + 1))
            grouped_rows = count
    return groups
