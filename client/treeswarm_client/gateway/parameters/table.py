"""Every parameter of every route for texts.  The page of parameters and the OpenAPI schema are made from this table."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from treeswarm.protocol.text_rules import MAX_BAD_WORDS, MAX_MIN_TOKENS, MAX_NGRAM, MAX_PENALTY, MAX_REPETITION_PENALTY
from treeswarm_client.gateway.parameters.checks import AnyObject, Anything, Flag, ListOf, Number, Seed, Text, Whole
from treeswarm_client.gateway.parameters.nested import LOGIT_BIAS, MESSAGES, STOPS, STREAM_OPTIONS
from treeswarm_client.gateway.parameters.parameter import EVERY_API, Api, Fields, Parameter, read_parameters

CHAT, COMPLETIONS = (Api.CHAT,), (Api.COMPLETIONS,)
OPENAI = CHAT + COMPLETIONS
MOST_TOKENS = 2**31 - 1
MAX_STOP_IDS = 256
MAX_SAMPLES = 128
PENALTY = Number(-MAX_PENALTY, MAX_PENALTY)

_SAMPLER = "nodes do not sample in this way"
_TOOLS = "no tools yet"
_GRAMMAR = "no structured output yet"
_TEMPLATE = "the model's own template writes the conversation"
_BOOKKEEPING = "changes no text"
_SERVICE = "the gateway has one class of service"
_STATE = "nothing is stored"
_TEXT_ONLY = "the model reads and writes text only"
_ANSWER = "the answer has one form"

HONOURED = (
    Parameter("model", EVERY_API, "name of the model, one of `/v1/models`", Text(), required=True),
    Parameter("messages", CHAT, "the conversation so far: give at least one message", MESSAGES, required=True),
    Parameter("prompt", COMPLETIONS, "text, token ids, or a list of either", Anything(), required=True),
    Parameter(
        "max_tokens", CHAT, "largest number of new tokens; without it, [as many as fit](#length)", Whole(1, MOST_TOKENS)
    ),
    Parameter("max_completion_tokens", CHAT, "newer name of `max_tokens`", Whole(1, MOST_TOKENS)),
    Parameter("max_tokens", COMPLETIONS, "largest number of new tokens, 16 by default", Whole(1, MOST_TOKENS)),
    Parameter("stop", OPENAI, "texts, at most 16; the answer ends before the first one that occurs", STOPS),
    Parameter(
        "stop_token_ids", OPENAI, "further token ids that end the answer", ListOf(Whole(0), "token ids", MAX_STOP_IDS)
    ),
    Parameter("ignore_eos", OPENAI, "whether to continue past the model's end token", Flag()),
    Parameter("n", OPENAI, "number of samples, generated side by side with one prefill", Whole(1, MAX_SAMPLES)),
    Parameter("stream", EVERY_API, "whether the answer comes as server-sent events", Flag()),
    Parameter("stream_options", OPENAI, "`include_usage`: a last chunk counts the tokens", Fields(STREAM_OPTIONS)),
    Parameter("chat_template_kwargs", CHAT, "variables that the model's template reads, by name", AnyObject()),
    Parameter(
        "continue_final_message", CHAT, "whether the answer goes on with the last message, one of `assistant`", Flag()
    ),
    Parameter(
        "add_generation_prompt",
        CHAT,
        "`false` together with `continue_final_message`, in place of which it is set",
        Flag(),
    ),
    Parameter("temperature", EVERY_API, "sampling temperature; 0 is greedy", Number(0, 2)),
    Parameter("top_p", EVERY_API, "smallest set of tokens with this probability is sampled from", Number(0, 1)),
    Parameter("top_k", OPENAI, "number of best tokens that are sampled from; 0 and -1 stand for all", Whole(-1)),
    Parameter("seed", OPENAI, "the same seed gives the same text; without one, each answer differs", Seed()),
    Parameter("presence_penalty", OPENAI, "subtracted from the logits of tokens that the answer has", PENALTY),
    Parameter(
        "frequency_penalty", OPENAI, "subtracted from a token's logit for each time that the answer has it", PENALTY
    ),
    Parameter(
        "repetition_penalty",
        OPENAI,
        "divides positive logits of tokens of prompt and answer, multiplies negative ones",
        Number(1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    ),
    Parameter("logit_bias", OPENAI, "token ids as texts, and what is added to their logits", LOGIT_BIAS),
    Parameter("min_p", OPENAI, "least probability of a token, as a share of the likeliest one's", Number(0, 1)),
    Parameter("typical_p", OPENAI, "probability that the most typical tokens kept have together", Number(1e-6, 1)),
    Parameter(
        "no_repeat_ngram_size",
        OPENAI,
        "length of n-grams that occur at most once in prompt and answer",
        Whole(0, MAX_NGRAM),
    ),
    Parameter(
        "bad_words", OPENAI, "texts that the answer never has", ListOf(Text(longest=256), "bad words", MAX_BAD_WORDS)
    ),
    Parameter("min_tokens", OPENAI, "number of tokens before which no end token is chosen", Whole(0, MAX_MIN_TOKENS)),
    Parameter("logprobs", CHAT, "whether the answer has the log-probability of each token", Flag()),
    Parameter("logprobs", COMPLETIONS, "0 for the log-probabilities of the answer's tokens", Whole(0, 20)),
    Parameter("top_logprobs", CHAT, "number of other tokens with their log-probabilities: 0", Whole(0, 20)),
)

# What would change the text and is not honoured, with the values that change nothing.
REFUSED = (
    Parameter("prompt_logprobs", OPENAI, "nodes send those of new tokens", neutral=()),
    Parameter("echo", COMPLETIONS, "put the prompt before the answer yourself", neutral=(False,)),
    Parameter("suffix", COMPLETIONS, "models continue texts at their end", neutral=("",)),
    Parameter("tools", CHAT, _TOOLS, neutral=([],)),
    Parameter("tool_choice", CHAT, _TOOLS, neutral=("none", "auto")),
    Parameter("functions", CHAT, _TOOLS, neutral=([],)),
    Parameter("function_call", CHAT, _TOOLS, neutral=("none", "auto")),
    Parameter("response_format", OPENAI, _GRAMMAR, neutral=({"type": "text"},)),
    Parameter("structured_outputs", OPENAI, _GRAMMAR, neutral=({},)),
    Parameter("guided_json", OPENAI, _GRAMMAR),
    Parameter("guided_regex", OPENAI, _GRAMMAR),
    Parameter("guided_choice", OPENAI, _GRAMMAR),
    Parameter("guided_grammar", OPENAI, _GRAMMAR),
    Parameter("grammar", OPENAI, _GRAMMAR, neutral=("",)),
    Parameter("json_schema", OPENAI, _GRAMMAR, neutral=({},)),
    Parameter("reasoning_effort", CHAT, "this model has no such setting"),
    Parameter("verbosity", CHAT, "say in a message how long the answer should be", neutral=("medium",)),
    Parameter("chat_template", CHAT, _TEMPLATE),
    Parameter("documents", CHAT, _TEMPLATE, neutral=([],)),
    Parameter("add_special_tokens", CHAT, "the template writes special tokens", neutral=(False,)),
    Parameter("add_special_tokens", COMPLETIONS, "send token ids for a prompt without them", neutral=(True,)),
    Parameter("truncate_prompt_tokens", OPENAI, "shorten the prompt yourself"),
    Parameter("allowed_token_ids", OPENAI, _SAMPLER),
    Parameter("logits_processors", OPENAI, "code of callers is never run", neutral=([],)),
    Parameter("use_beam_search", OPENAI, "nodes send tokens, beam search needs all logits", neutral=(False,)),
    Parameter("best_of", OPENAI, "ask for n samples and choose one yourself", neutral=(1,)),
    Parameter("modalities", CHAT, _TEXT_ONLY, neutral=(["text"],)),
    Parameter("audio", CHAT, _TEXT_ONLY),
    Parameter("web_search_options", CHAT, "the gateway searches nothing"),
    Parameter("plugins", CHAT, "the gateway has none", neutral=([],)),
    Parameter("top_a", OPENAI, _SAMPLER, neutral=(0,)),
    Parameter("tfs_z", OPENAI, _SAMPLER, neutral=(1,)),
    Parameter("mirostat", OPENAI, _SAMPLER, neutral=(0,)),
    Parameter("dynatemp_range", OPENAI, _SAMPLER, neutral=(0,)),
    Parameter("dry_multiplier", OPENAI, _SAMPLER, neutral=(0,)),
    Parameter("xtc_probability", OPENAI, _SAMPLER, neutral=(0,)),
    Parameter("repeat_penalty", OPENAI, "llama.cpp's looks at the last tokens only", neutral=(1,)),
    Parameter("samplers", OPENAI, _SAMPLER, neutral=([],)),
    Parameter("n_predict", OPENAI, "use max_tokens", neutral=(-1,)),
    Parameter("store", CHAT, _STATE, neutral=(False,)),
)

# What changes the form of the answer alone, and is not honoured.
FORM = (
    Parameter("skip_special_tokens", OPENAI, "special tokens are left out of texts", neutral=(True,)),
    Parameter("spaces_between_special_tokens", OPENAI, "special tokens are left out of texts", neutral=(True, False)),
    Parameter("include_stop_str_in_output", OPENAI, "the text ends before a stop string", neutral=(False,)),
    Parameter("detokenize", OPENAI, "answers are texts", neutral=(True,)),
    Parameter("return_token_ids", OPENAI, _ANSWER, neutral=(False,)),
    Parameter("return_tokens_as_token_ids", OPENAI, _ANSWER, neutral=(False,)),
    Parameter("return_progress", OPENAI, _ANSWER, neutral=(False,)),
    Parameter("timings_per_token", OPENAI, _ANSWER, neutral=(False,)),
    Parameter("n_probs", OPENAI, "use logprobs", neutral=(0,)),
)

NEUTRAL = (
    Parameter("user", OPENAI, _BOOKKEEPING, neutral=None),
    Parameter("metadata", OPENAI, _BOOKKEEPING, neutral=None),
    Parameter("safety_identifier", OPENAI, _BOOKKEEPING, neutral=None),
    Parameter("service_tier", OPENAI, _SERVICE, neutral=None),
    Parameter("priority", OPENAI, _SERVICE, neutral=None),
    Parameter("request_id", OPENAI, "send the header x-request-id", neutral=None),
    Parameter("prompt_cache_key", OPENAI, "nodes keep what they have computed by themselves", neutral=None),
    Parameter("prompt_cache_retention", OPENAI, "nodes keep what they have computed by themselves", neutral=None),
    Parameter("prompt_cache_options", OPENAI, "nodes keep what they have computed by themselves", neutral=None),
    Parameter("cache_prompt", OPENAI, "nodes keep what they have computed by themselves", neutral=None),
    Parameter("cache_salt", OPENAI, "every API key has a cache of its own", neutral=None),
    Parameter("id_slot", OPENAI, "nodes choose where a text is computed", neutral=None),
    Parameter("repeat_last_n", OPENAI, "has no effect without repeat_penalty", neutral=None),
    Parameter("length_penalty", OPENAI, "has no effect without beam search", neutral=None),
    Parameter("early_stopping", OPENAI, "has no effect without beam search", neutral=None),
    Parameter("prediction", CHAT, "trees of tokens are drafted anyway", neutral=None),
    Parameter("parallel_tool_calls", CHAT, "has no effect without tools", neutral=None),
)

TABLE = (*HONOURED, *REFUSED, *FORM, *NEUTRAL)


@cache
def parameters_of(api: Api) -> tuple[Parameter, ...]:
    """Return the parameters that a route knows."""
    return tuple(parameter for parameter in TABLE if api in parameter.apis)


def read_request(body: Mapping[str, Any], api: Api) -> dict[str, Any]:
    """Return the honoured parameters of a request, checked.  Raises InvalidParameter and Unsupported."""
    return read_parameters(body, parameters_of(api))
