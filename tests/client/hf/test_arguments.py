"""Arguments of `generate` are read in transformers' order, and what a swarm cannot honour is refused."""

import inspect
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from treeswarm.errors import BadRequest
from treeswarm.protocol.text_rules import TextRules
from treeswarm_client.hf.arguments import GenerateArguments, LengthLimits, SpecialTokens, check_loading, read_arguments
from treeswarm_client.hf.limits import HONOURED, INDIFFERENT, LIMITED, LOADING
from treeswarm_client.hf.rules import RuleArguments

WHERE = "the generation_config.json of 'm'"
TAKEN = {"self", "inputs", "generation_config", "streamer", "kwargs"}


def read(*, passed: dict[str, Any] | None = None, own: dict[str, Any] | None = None, **given: Any) -> GenerateArguments:
    return read_arguments(given, passed or {}, own or {}, WHERE)


def test_every_argument_of_transformers_is_classified() -> None:
    names = HONOURED | INDIFFERENT | LIMITED.keys()
    assert GenerationConfig().__dict__.keys() <= names
    assert inspect.signature(GenerationMixin.generate).parameters.keys() - TAKEN <= names
    assert not HONOURED & INDIFFERENT
    assert not LIMITED.keys() & (HONOURED | INDIFFERENT)


def test_defaults_of_transformers_change_nothing() -> None:
    """This covers the defaults that transformers fills in, and a config saved with all of them."""
    defaults = GenerationConfig._get_default_generation_params()
    assert read(own=defaults, do_sample=True, max_length=None).sampling.top_k == 50
    assert read(**defaults).sampling.temperature == 0.0
    assert read(own=GenerationConfig().to_dict()).samples == 1


@pytest.mark.parametrize("limit", LIMITED)
def test_neutral_values_are_accepted_from_every_layer(limit: str) -> None:
    for value in (None, *LIMITED[limit].neutral):
        assert read(**{limit: value}) == read(own={limit: value}) == read(passed={limit: value}) == read()


REFUSED: list[tuple[str, Any, str]] = [
    ("logits_processor", LogitsProcessorList([lambda ids, scores: scores]), "nodes do not change logits so"),
    ("logits_processor", [lambda ids, scores: scores], "AutoModelForCausalLM"),
    ("prefix_allowed_tokens_fn", lambda batch, ids: [1], "nodes do not change logits so"),
    ("num_beams", 4, "use num_beams=1"),
    ("num_beam_groups", 2, "beam search"),
    ("penalty_alpha", 0.6, "AutoModelForCausalLM"),
    ("sequence_bias", {(5, 6): 1.0}, "biases to single tokens"),
    ("sequence_bias", [[[5]]], "pairs of token ids and a bias"),
    ("bad_words_ids", [[]], "an empty sequence"),
    ("bad_words_ids", [["a"]], "give token ids"),
    ("repetition_penalty", "high", "give a number"),
    ("repetition_penalty", 0.0, "out of range"),
    ("min_p", 0.05, "add do_sample=True"),
    ("guidance_scale", 1.5, "AutoModelForCausalLM"),
    ("assistant_model", object(), r"from_pretrained\(draft="),
    ("prompt_lookup_num_tokens", 5, "ngram"),
    ("constraints", [object()], "beam search"),
    ("output_attentions", True, "log-probabilities"),
    ("output_hidden_states", True, "log-probabilities"),
    ("output_logits", True, "log-probabilities"),
    ("epsilon_cutoff", 1e-4, "top_p or top_k"),
    ("eta_cutoff", 1e-4, "top_p or top_k"),
    ("top_h", 0.4, "top_p or top_k"),
    ("past_key_values", object(), "inference_session"),
    ("inputs_embeds", torch.zeros(1, 2, 3), "give token ids"),
    ("position_ids", torch.zeros(1, 2), "give token ids"),
    ("custom_generate", "org/recipe", "greedy decoding and sampling"),
    ("cache_implementation", "quantized", "unquantised"),
    ("watermarking_config", {"bias": 2.0}, "AutoModelForCausalLM"),
    ("max_token", 5, "did you mean 'max_new_tokens'"),
]


@pytest.mark.parametrize(("name", "value", "advice"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_unsupported_arguments_are_refused_by_name(name: str, value: Any, advice: str) -> None:
    with pytest.raises(BadRequest, match=f"{name}.*{advice}"):
        read(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("encoder_repetition_penalty", 1.05), ("guidance_scale", 2), ("begin_suppress_tokens", [7])]
)
def test_unsupported_model_config_is_refused_with_advice(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=rf"generation_config\.json of 'm' says {name}=.* generate\({name}=") as caught:
        read(own={name: value})
    assert f"generate({name}={LIMITED[name].neutral[0]!r})" in str(caught.value)
    assert read(own={name: value}, **{name: LIMITED[name].neutral[0]}) == read()
    with pytest.raises(BadRequest, match=f"generation_config says {name}"):
        read(passed={name: value})


def test_sampling_config_is_ignored_by_greedy_decoding() -> None:
    own = {"do_sample": True, "min_p": 0.1, "temperature": 0.6, "top_p": 0.9, "top_k": 0}
    assert read(own=own).rules.rules.min_p == 0.1
    assert read(own=own, do_sample=False) == read()
    sampled = read(own=own, min_p=None).sampling
    assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.6, 0.9, 0)


def test_arguments_override_given_config_over_model_config() -> None:
    own = {"max_new_tokens": 1, "max_length": 10, "eos_token_id": [1, 2], "bos_token_id": 4}
    passed = {"max_new_tokens": 2, "eos_token_id": None, "pad_token_id": 9}
    assert read(own=own).lengths.max_new_tokens == 1
    both = read(own=own, passed=passed)
    assert both.lengths.max_new_tokens == 2
    assert both.special == SpecialTokens(eos_ids=(1, 2), pad_id=9, bos_id=4)
    assert read(own=own, passed=passed, max_new_tokens=3).lengths.max_new_tokens == 3
    without = read(own=own, max_new_tokens=None, eos_token_id=None)
    assert without.lengths == LengthLimits(max_new_tokens=None, max_length=10)
    assert (without.special.eos_ids, without.special.pad_id) == ((), None)
    assert read(own=own, eos_token_id=torch.tensor([5])).special.eos_ids == (5,)
    assert read(own=own).special.pad_id == 1, "the first end token pads"


def test_max_length_counts_the_padding() -> None:
    assert read(max_new_tokens=7).lengths.new_tokens(100, 2048) == 7
    assert read(max_length=30).lengths.new_tokens(12, 2048) == 18
    assert read(max_length=30, max_new_tokens=5).lengths.new_tokens(12, 2048) == 5
    assert read().lengths.new_tokens(12, 2048) == 20
    assert read().lengths.new_tokens(2040, 2048) == 8
    for impossible in (read(max_length=12), read(max_new_tokens=0)):
        with pytest.raises(BadRequest, match="raise max_new_tokens"):
            impossible.lengths.new_tokens(12, 2048)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.7}, "add do_sample=True"),
        ({"top_p": 0.7}, "add do_sample=True"),
        ({"top_k": 7}, "add do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=False for greedy"),
        ({"do_sample": True, "temperature": "hot"}, "give a number"),
        ({"num_return_sequences": 2}, "add do_sample=True"),
        ({"do_sample": True, "num_return_sequences": 0}, "at least 1"),
        ({"max_new_tokens": 2.5}, "whole number"),
        ({"eos_token_id": "</s>"}, "token id"),
        ({"pad_token_id": [1.5]}, "token id"),
        ({"frobnicate": 5}, r"no argument 'frobnicate'$"),
    ],
    ids=str,
)
def test_contradictory_arguments_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read(**given)


def test_what_ends_texts_is_read() -> None:
    def criterion(ids: Any, scores: Any) -> bool:
        return True

    assert not read().stops
    stops = read(stop_strings="x", stopping_criteria=StoppingCriteriaList([criterion]), max_time=3).stops
    assert (stops.strings, stops.criteria, stops.max_time) == (("x",), (criterion,), 3.0)
    assert read(passed={"max_time": 2.0}).stops.max_time == 2.0
    assert not read(stopping_criteria=StoppingCriteriaList()).stops
    for wrong in ({"stopping_criteria": [5]}, {"max_time": "soon"}):
        with pytest.raises(BadRequest, match=next(iter(wrong))):
            read(**wrong)


def test_scores_are_those_of_the_model_only_without_filters() -> None:
    assert read(output_scores=True).with_scores
    assert not read(top_k=5, do_sample=False).sampling.changes_scores
    assert not read(do_sample=True, top_k=0).sampling.changes_scores
    assert read(do_sample=True).sampling.changes_scores  # transformers' default is top_k=50


def test_do_sample_false_ignores_sampling_arguments() -> None:
    assert read(do_sample=False, temperature=0.7, top_p=0.5, top_k=3) == read()
    assert read(temperature=0.0) == read(temperature=1.0) == read()


@pytest.mark.parametrize(
    ("name", "value"),
    [("device_map", "auto"), ("load_in_4bit", True), ("trust_remote_code", True), ("subfolder", "x"), ("tokens", 1)],
)
def test_options_for_loading_weights_are_refused(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=name):
        check_loading({name: value})
    check_loading({option: limit.neutral[0] for option, limit in LOADING.items()})


def test_arguments_that_change_logits_are_rules() -> None:
    arguments = read(
        repetition_penalty=1.3,
        no_repeat_ngram_size=3,
        bad_words_ids=[[5], [6, 7], [2]],
        sequence_bias=[[[8], 1.5], [[9, 4], float("-inf")]],
        suppress_tokens=torch.tensor([3]),
        min_new_tokens=4,
        min_length=20,
        min_p=0.1,
        typical_p=0.9,
        do_sample=True,
        eos_token_id=2,
    ).rules
    expected = TextRules(
        repetition_penalty=1.3,
        no_repeat_ngram_size=3,
        bad_words=((9, 4), (5,), (6, 7), (3,)),
        logit_bias=((8, 1.5),),
        min_tokens=4,
        min_p=0.1,
        typical_p=0.9,
    )
    assert arguments.rules == expected, "a bad word that is the end token alone is left out, as by transformers"
    assert arguments.for_prompt(12).min_tokens == 8
    assert arguments.for_prompt(30).min_tokens == 4
    assert read(own={"repetition_penalty": 1.1}, eos_token_id=None, min_length=9).rules == RuleArguments(
        TextRules(repetition_penalty=1.1)
    )
