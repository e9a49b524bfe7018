"""Every parameter of every route for texts.  The page of parameters and the OpenAPI schema are made from this table."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from treeswarm.protocol.messages import MAX_ALTERNATIVES
from treeswarm.protocol.text_rules import MAX_BAD_WORDS, MAX_MIN_TOKENS, MAX_NGRAM, MAX_PENALTY, MAX_REPETITION_PENALTY
from treeswarm_client.gateway.parameters.checks import (
    AnyObject,
    Anything,
    ListOf,
    Number,
    Seed,
    Text,
    TrueOrFalse,
    Whole,
)
from treeswarm_client.gateway.parameters.conversations import ANTHROPIC_MESSAGES, INPUT
from treeswarm_client.gateway.parameters.grammars import (
    CHOICE,
    FORMAT,
    FORMAT_HOLDER,
    GRAMMAR,
    JSON_SCHEMA,
    REGEX,
    STRUCTURED_OUTPUTS,
)
from treeswarm_client.gateway.parameters.nested import CONTENT, LOGIT_BIAS, MESSAGES, STOPS, STREAM_OPTIONS
from treeswarm_client.gateway.parameters.parameter import EVERY_API, Api, Fields, Parameter, read_parameters
from treeswarm_client.gateway.parameters.tools import (
    ANTHROPIC_CHOICES,
    ANTHROPIC_THINKING,
    ANTHROPIC_TOOLS,
    FLAT_CHOICE,
    FLAT_TOOLS,
    TOOL_CHOICE,
    TOOLS,
)

CHAT, COMPLETIONS, RESPONSES, ANTHROPIC = ((api,) for api in Api)
OPENAI = CHAT + COMPLETIONS
CONVERSATIONS = CHAT + RESPONSES + ANTHROPIC
MOST_TOKENS = 2**31 - 1
MAX_STOP_IDS = 256
MAX_SAMPLES = 128
INCLUDE = ListOf(Text(("message.output_text.logprobs", "reasoning.encrypted_content")), "things", 8)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
REASONING = (
    Parameter("effort", RESPONSES, "how much the model thinks", Text(EFFORTS)),
    Parameter("summary", RESPONSES, "thoughts are sent as they are"),
    Parameter("generate_summary", RESPONSES, "thoughts are sent as they are"),
)
PENALTY = Number(-MAX_PENALTY, MAX_PENALTY)

_SAMPLER = "nodes do not sample in this way"
_TEMPLATE = "the model's own template writes the conversation"
_REASONING = "give chat_template_kwargs as the model's template reads them"
_CONVERSATION = "the gateway keeps no conversations: send all messages each time"
_BOOKKEEPING = "changes no text"
_CACHE = "nodes keep what they have computed by themselves"
_SERVICE = "the gateway has one class of service"
_STATE = "nothing is stored"
_TEXT_ONLY = "the model reads and writes text only"
_ANSWER = "the answer has one form"

FORMED = (
    Parameter("response_format", OPENAI, "form of the answer: `text`, `json_object` or `json_schema`", FORMAT),
    Parameter(
        "text", RESPONSES, "`format`, the form of the answer: `text`, `json_object` or `json_schema`", FORMAT_HOLDER
    ),
    Parameter("output_config", ANTHROPIC, "`format`, the form of the answer: `json_schema`", FORMAT_HOLDER),
    Parameter("output_format", ANTHROPIC, "older name of `output_config.format`", FORMAT),
    Parameter(
        "structured_outputs",
        EVERY_API,
        "one of `json` (a schema), `regex`, `choice`, `grammar` (Lark or GBNF) and `json_object`",
        STRUCTURED_OUTPUTS,
    ),
    Parameter("guided_json", OPENAI, "older name of `structured_outputs.json`", JSON_SCHEMA),
    Parameter("guided_regex", OPENAI, "older name of `structured_outputs.regex`", REGEX),
    Parameter("guided_choice", OPENAI, "older name of `structured_outputs.choice`", CHOICE),
    Parameter("guided_grammar", OPENAI, "older name of `structured_outputs.grammar`", GRAMMAR),
    Parameter("grammar", OPENAI, "llama.cpp's name of `structured_outputs.grammar`", GRAMMAR),
    Parameter("json_schema", OPENAI, "llama.cpp's name of `structured_outputs.json`", JSON_SCHEMA),
)

HONOURED = (
    Parameter("model", EVERY_API, "name of the model, one of `/v1/models`", Text(), required=True),
    Parameter("messages", CHAT, "the conversation so far: give at least one message", MESSAGES, required=True),
    Parameter(
        "messages",
        ANTHROPIC,
        "the conversation so far; the answer goes on with a last message of `assistant`",
        ANTHROPIC_MESSAGES,
        required=True,
    ),
    Parameter("system", ANTHROPIC, "text that precedes the conversation", CONTENT),
    Parameter("input", RESPONSES, "a text, or the items of the conversation so far", INPUT, required=True),
    Parameter("instructions", RESPONSES, "text that precedes the conversation", Text()),
    Parameter("prompt", COMPLETIONS, "text, token ids, or a list of either", Anything(), required=True),
    Parameter(
        "max_tokens", CHAT, "largest number of new tokens; without it, [as many as fit](#length)", Whole(1, MOST_TOKENS)
    ),
    Parameter("max_completion_tokens", CHAT, "newer name of `max_tokens`", Whole(1, MOST_TOKENS)),
    Parameter(
        "max_tokens", COMPLETIONS, "largest number of new tokens, 16 by default; 0 with `echo`", Whole(0, MOST_TOKENS)
    ),
    Parameter("max_output_tokens", RESPONSES, "the same as `max_tokens` in chats", Whole(1, MOST_TOKENS)),
    Parameter(
        "max_tokens",
        ANTHROPIC,
        "largest number of new tokens, [as far as they fit](#length)",
        Whole(1, MOST_TOKENS),
        required=True,
    ),
    Parameter("stop", OPENAI, "texts, at most 16; the answer ends before the first one that occurs", STOPS),
    Parameter(
        "stop_token_ids",
        EVERY_API,
        "further token ids that end the answer",
        ListOf(Whole(0), "token ids", MAX_STOP_IDS),
    ),
    Parameter("stop_sequences", ANTHROPIC, "the same as `stop`", STOPS),
    Parameter("ignore_eos", EVERY_API, "whether to continue past the model's end token", TrueOrFalse()),
    Parameter("n", OPENAI, "number of samples, generated side by side with one prefill", Whole(1, MAX_SAMPLES)),
    Parameter("stream", EVERY_API, "whether the answer comes as server-sent events", TrueOrFalse()),
    Parameter(
        "stream_options",
        OPENAI,
        "`include_usage`: a last chunk counts the tokens; `include_traversals`: [which came together](#traversals)",
        Fields(STREAM_OPTIONS),
    ),
    Parameter("chat_template_kwargs", CONVERSATIONS, "variables that the model's template reads, by name", AnyObject()),
    Parameter(
        "continue_final_message",
        CHAT,
        "whether the answer goes on with the last message, one of `assistant`",
        TrueOrFalse(),
    ),
    Parameter(
        "add_generation_prompt",
        CHAT,
        "`false` together with `continue_final_message`, in place of which it is set",
        TrueOrFalse(),
    ),
    Parameter("tools", CHAT, "[functions](#tools) that the model may call", TOOLS),
    Parameter(
        "functions",
        CHAT,
        "older form of `tools`, for one `function_call`",
        ListOf(AnyObject(), "functions", 128),
    ),
    Parameter("function_call", CHAT, "older form of `tool_choice`", Anything()),
    Parameter("tools", RESPONSES, "the same; tools that OpenAI runs are refused", FLAT_TOOLS),
    Parameter("tools", ANTHROPIC, "the same; tools that Anthropic runs are refused", ANTHROPIC_TOOLS),
    Parameter("tool_choice", RESPONSES, "the same as in chats", FLAT_CHOICE),
    Parameter("tool_choice", ANTHROPIC, "`auto`, `none`, `any` or one tool, one call or several", ANTHROPIC_CHOICES),
    Parameter("thinking", ANTHROPIC, "`disabled`, if the model has such a setting, or `adaptive`", ANTHROPIC_THINKING),
    Parameter("reasoning", RESPONSES, "`effort`: the same as `reasoning_effort`", Fields(REASONING)),
    Parameter(
        "tool_choice",
        CHAT,
        "`auto`, `none`, `required`, or the function that must be called",
        TOOL_CHOICE,
    ),
    Parameter(
        "parallel_tool_calls",
        CHAT + RESPONSES,
        "whether an answer may call several functions, as by default",
        TrueOrFalse(),
    ),
    Parameter(
        "reasoning_effort",
        CHAT,
        f"{', '.join(f'`{effort}`' for effort in EFFORTS)}, for models whose template has such a setting",
        Text(EFFORTS),
    ),
    Parameter("temperature", EVERY_API, "sampling temperature; 0 is greedy", Number(0, 2)),
    Parameter("top_p", EVERY_API, "smallest set of tokens with this probability is sampled from", Number(0, 1)),
    Parameter("top_k", EVERY_API, "number of best tokens that are sampled from; 0 and -1 stand for all", Whole(-1)),
    Parameter("seed", EVERY_API, "the same seed gives the same text; without one, each answer differs", Seed()),
    Parameter("presence_penalty", EVERY_API, "subtracted from the logits of tokens that the answer has", PENALTY),
    Parameter(
        "frequency_penalty", EVERY_API, "subtracted from a token's logit for each time that the answer has it", PENALTY
    ),
    Parameter(
        "repetition_penalty",
        EVERY_API,
        "divides positive logits of tokens of prompt and answer, multiplies negative ones",
        Number(1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    ),
    Parameter("logit_bias", EVERY_API, "token ids as texts, and what is added to their logits", LOGIT_BIAS),
    Parameter("min_p", EVERY_API, "least probability of a token, as a share of the likeliest one's", Number(0, 1)),
    Parameter("typical_p", EVERY_API, "probability that the most typical tokens kept have together", Number(1e-6, 1)),
    Parameter(
        "no_repeat_ngram_size",
        EVERY_API,
        "length of n-grams that occur at most once in prompt and answer",
        Whole(0, MAX_NGRAM),
    ),
    Parameter(
        "bad_words", EVERY_API, "texts that the answer never has", ListOf(Text(longest=256), "bad words", MAX_BAD_WORDS)
    ),
    *FORMED,
    Parameter(
        "min_tokens", EVERY_API, "number of tokens before which no end token is chosen", Whole(0, MAX_MIN_TOKENS)
    ),
    Parameter("logprobs", CHAT, "whether the answer has the log-probability of each token", TrueOrFalse()),
    Parameter(
        "logprobs",
        COMPLETIONS,
        "number of likeliest tokens with their log-probabilities beside each token's own",
        Whole(0, MAX_ALTERNATIVES),
    ),
    Parameter(
        "echo", COMPLETIONS, "whether the answer begins with the prompt; with `logprobs` that is scored", TrueOrFalse()
    ),
    Parameter(
        "prompt_logprobs",
        OPENAI,
        "the same as `logprobs` for the prompt's tokens, in vLLM's form",
        Whole(0, MAX_ALTERNATIVES),
    ),
    Parameter(
        "include", RESPONSES, "`message.output_text.logprobs`: log-probabilities of the answer's tokens", INCLUDE
    ),
    Parameter(
        "top_logprobs",
        CHAT + RESPONSES,
        "number of likeliest tokens with their log-probabilities beside each token's",
        Whole(0, MAX_ALTERNATIVES),
    ),
)

# What would change the text and is not honoured, with the values that change nothing.
REFUSED = (
    Parameter("suffix", COMPLETIONS, "models continue texts at their end", neutral=("",)),
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
    Parameter("store", CHAT + RESPONSES, _STATE, neutral=(False,)),
    Parameter("previous_response_id", RESPONSES, _CONVERSATION),
    Parameter("conversation", RESPONSES, _CONVERSATION),
    Parameter("prompt", RESPONSES, "the gateway keeps no prompts: send the text"),
    Parameter("background", RESPONSES, _STATE, neutral=(False,)),
    Parameter("context_management", RESPONSES + ANTHROPIC, _CONVERSATION, neutral=([], {})),
    Parameter("truncation", RESPONSES, "shorten the conversation yourself", neutral=("disabled",)),
    Parameter("moderation", RESPONSES, "the gateway moderates nothing"),
    Parameter("container", ANTHROPIC, "the gateway runs no code"),
    Parameter("mcp_servers", ANTHROPIC, "the gateway calls no servers", neutral=([],)),
    Parameter("speed", ANTHROPIC, _SERVICE, neutral=("standard",)),
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
    Parameter("user", OPENAI + RESPONSES, _BOOKKEEPING, neutral=None),
    Parameter("metadata", EVERY_API, _BOOKKEEPING, neutral=None),
    Parameter("safety_identifier", OPENAI + RESPONSES, _BOOKKEEPING, neutral=None),
    Parameter("service_tier", EVERY_API, _SERVICE, neutral=None),
    Parameter("priority", EVERY_API, _SERVICE, neutral=None),
    Parameter("request_id", EVERY_API, "send the header x-request-id", neutral=None),
    Parameter("prompt_cache_key", OPENAI + RESPONSES, _CACHE, neutral=None),
    Parameter("prompt_cache_retention", OPENAI + RESPONSES, _CACHE, neutral=None),
    Parameter("prompt_cache_options", OPENAI + RESPONSES, _CACHE, neutral=None),
    Parameter("cache_prompt", OPENAI, _CACHE, neutral=None),
    Parameter("cache_salt", EVERY_API, "every API key has a cache of its own", neutral=None),
    Parameter("id_slot", OPENAI, "nodes choose where a text is computed", neutral=None),
    Parameter("repeat_last_n", OPENAI, "has no effect without repeat_penalty", neutral=None),
    Parameter("length_penalty", OPENAI, "has no effect without beam search", neutral=None),
    Parameter("early_stopping", OPENAI, "has no effect without beam search", neutral=None),
    Parameter("prediction", CHAT, "trees of tokens are drafted anyway", neutral=None),
    Parameter("stream_options", RESPONSES, "the padding changes no text", neutral=None),
    Parameter("cache_control", ANTHROPIC, _CACHE, neutral=None),
    Parameter("inference_geo", ANTHROPIC, "nodes are where they are", neutral=None),
    Parameter("max_tool_calls", RESPONSES, "limits tools that OpenAI runs", neutral=None),
)

TABLE = (*HONOURED, *REFUSED, *FORM, *NEUTRAL)


@cache
def parameters_of(api: Api) -> tuple[Parameter, ...]:
    """Return the parameters that a route knows."""
    return tuple(parameter for parameter in TABLE if api in parameter.apis)


def read_request(body: Mapping[str, Any], api: Api) -> dict[str, Any]:
    """Return the honoured parameters of a request, checked.  Raises InvalidParameter and Unsupported."""
    return read_parameters(body, parameters_of(api))
