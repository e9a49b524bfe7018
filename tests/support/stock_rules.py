"""What stock transformers makes of logits under rules: the reference for every knob."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import TextRules
from treeswarm.session.noise import gumbel_row


class OutputPenalties:
    """Presence and frequency penalty as OpenAI documents them; transformers has none."""

    def __init__(self, rules: TextRules, prompt_length: int) -> None:
        self._rules, self._prompt_length = rules, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self._prompt_length :], minlength=scores.shape[-1])[None]
        scores = scores - self._rules.frequency_penalty * counts
        return scores - self._rules.presence_penalty * (counts > 0)


def stock_processors(rules: TextRules, prompt_length: int) -> LogitsProcessorList:
    """Return transformers' own processors for rules, in the order in which `generate` makes them."""
    made: list[Any] = []
    if rules.logit_bias:
        made.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in rules.logit_bias]))
    if rules.repetition_penalty != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(rules.repetition_penalty))
    if rules.presence_penalty or rules.frequency_penalty:
        made.append(OutputPenalties(rules, prompt_length))
    if rules.no_repeat_ngram_size:
        made.append(NoRepeatNGramLogitsProcessor(rules.no_repeat_ngram_size))
    if rules.bad_words:
        made.append(NoBadWordsLogitsProcessor([list(word) for word in rules.bad_words]))
    if rules.min_tokens and rules.end_tokens:
        made.append(MinNewTokensLengthLogitsProcessor(prompt_length, rules.min_tokens, list(rules.end_tokens)))
    return LogitsProcessorList(made)


def stock_filters(settings: SamplingSettings, rules: TextRules) -> LogitsProcessorList:
    """Return transformers' own filters of a sampled text, in the order in which `generate` makes them."""
    made: list[Any] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k:
        made.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        made.append(TopPLogitsWarper(settings.top_p))
    if rules.min_p:
        made.append(MinPLogitsWarper(rules.min_p))
    if rules.typical_p < 1.0:
        made.append(TypicalLogitsWarper(rules.typical_p))
    return LogitsProcessorList(made)


def stock_token(
    context: Sequence[int], logits: torch.Tensor, rules: TextRules, prompt_length: int, settings: SamplingSettings
) -> int | None:
    """Return the token after a context with these logits [vocab], or None if the rules allow none.

    A sampled token is chosen by this project's noise in place of torch's random numbers.
    """
    ids = torch.tensor([list(context)])
    scores = stock_processors(rules, prompt_length)(ids, logits[None].clone())
    if bool((scores == -torch.inf).all()):
        return None
    if not settings.greedy:
        scores = torch.log_softmax(stock_filters(settings, rules)(ids, scores), -1)
        scores = scores + torch.from_numpy(gumbel_row(settings.seed, settings.sample, len(context), scores.shape[-1]))
    return int(scores[0].argmax())
