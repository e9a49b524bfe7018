"""OpenAI's requests for chats and completions, translated into a `GenerationRequest`.  Pure."""

import secrets
from collections.abc import Mapping
from typing import Any

from treeswarm_client.chat_template.messages import REASONING_NAMES
from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.generation_request import (
    AnswerOptions,
    ChatPrompt,
    EndOptions,
    GenerationRequest,
    InvalidParameter,
    SamplingOptions,
    Unsupported,
)
from treeswarm_client.gateway.parameters.grammars import grammar_of
from treeswarm_client.gateway.parameters.parameter import Api
from treeswarm_client.gateway.parameters.table import read_request

# Number of new tokens of a completion that names no limit: OpenAI's default.
DEFAULT_COMPLETION_TOKENS = 16
LARGEST_SEED = 2**63
# What an assistant's message may have in place of content.
SAID_OTHERWISE = {"tool_calls", *REASONING_NAMES}
# Parameters with the names of fields of `TextRules`.
RULES = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_p", "typical_p",
    "no_repeat_ngram_size", "min_tokens",
)  # fmt: skip


def parse_chat_request(body: Mapping[str, Any], limits: GatewayLimits) -> GenerationRequest:
    """Translate a chat request.  Raises InvalidParameter and Unsupported."""
    values = read_request(body, Api.CHAT)
    if "top_logprobs" in values and not values.get("logprobs"):
        raise Unsupported("top_logprobs", "top_logprobs is given without logprobs: add logprobs: true, or leave it out")
    return make_request(
        values,
        limits,
        chat=chat_of(values),
        max_tokens=values.get("max_completion_tokens", values.get("max_tokens")),
        default_max_tokens=limits.max_tokens,
        logprobs=values.get("top_logprobs", 0) if values.get("logprobs") else None,
    )


def parse_completion_request(body: Mapping[str, Any], limits: GatewayLimits) -> GenerationRequest:
    """Translate a completion request.  Raises InvalidParameter and Unsupported."""
    values = read_request(body, Api.COMPLETIONS)
    if values.get("max_tokens") == 0 and not values.get("echo"):
        raise InvalidParameter("max_tokens", "max_tokens is 0, which gives an answer only together with echo: give 1")
    return make_request(
        values,
        limits,
        prompts=_parse_prompts(values["prompt"], limits),
        max_tokens=values.get("max_tokens"),
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=values.get("logprobs"),
    )


def make_request(
    values: Mapping[str, Any],
    limits: GatewayLimits,
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
    prompts: tuple[str | tuple[int, ...], ...] = (),
    chat: ChatPrompt | None = None,
) -> GenerationRequest:
    """Return the request for checked parameters that have the names of OpenAI.  Raises Unsupported."""
    request = GenerationRequest(
        sampling=_sampling_of(values),
        ends=EndOptions(
            max_tokens=max_tokens,
            default_max_tokens=default_max_tokens,
            stops=tuple(values.get("stop", ())),
            stop_token_ids=tuple(values.get("stop_token_ids", ())),
            ignore_eos=values.get("ignore_eos", False),
        ),
        answer=AnswerOptions(
            stream=values.get("stream", False),
            include_usage=values.get("stream_options", {}).get("include_usage", False),
            include_traversals=values.get("stream_options", {}).get("include_traversals", False),
            logprobs=logprobs,
            prompt_logprobs=_prompt_logprobs(values, logprobs),
            shows_prompt_logprobs="prompt_logprobs" in values,
            echo=values.get("echo", False),
        ),
        prompts=prompts,
        chat=chat,
        n=values.get("n", 1),
    )
    if request.choices > limits.choices:
        raise Unsupported("n", f"the request asks for {request.choices} choices: ask for at most {limits.choices}")
    return request


def _prompt_logprobs(values: Mapping[str, Any], logprobs: int | None) -> int | None:
    """Return how many likeliest tokens are wanted beside each of the prompt's, or None if that is not scored."""
    if "prompt_logprobs" in values and values.get("stream"):
        raise Unsupported("prompt_logprobs", "prompt_logprobs is given with stream: ask for the whole answer")
    wanted = [values["prompt_logprobs"]] if "prompt_logprobs" in values else []
    if values.get("echo") and (logprobs is not None or values.get("max_tokens") == 0):
        wanted.append(logprobs or 0)
    return max(wanted, default=None)


def _sampling_of(values: Mapping[str, Any]) -> SamplingOptions:
    settings = {name: values[name] for name in ("temperature", "top_p", "top_k") if name in values}
    if "top_p" in settings:
        # OpenAI allows 0, which keeps the most likely token only; the smallest positive p does the same.
        settings["top_p"] = max(1e-6, settings["top_p"])
    if "top_k" in settings:
        settings["top_k"] = max(0, settings["top_k"])
    rules = {name: values[name] for name in RULES if name in values}
    if (grammar := grammar_of(values)) is not None:
        rules["grammar"] = grammar
    return SamplingOptions(
        settings=settings,
        seed=values["seed"] % LARGEST_SEED if "seed" in values else secrets.randbits(48),
        rules=rules,
        bad_words=tuple(values.get("bad_words", ())),
    )


def chat_of(values: Mapping[str, Any]) -> ChatPrompt:
    """Return the conversation of checked parameters.  Raises InvalidParameter and Unsupported."""
    messages = tuple(_as_template_message(at, message) for at, message in enumerate(values["messages"]))
    continues = values.get("continue_final_message", False)
    if continues and messages[-1]["role"] != "assistant":
        raise InvalidParameter(
            "continue_final_message",
            f"continue_final_message is true, but the last message is one of {messages[-1]['role']}: end with one of "
            "assistant",
        )
    if values.get("add_generation_prompt", not continues) == continues:
        raise Unsupported(
            "add_generation_prompt",
            "add_generation_prompt and continue_final_message are the same: an answer is a new message or goes on with "
            "the last one",
        )
    return make_chat(messages, values, continues=continues)


def make_chat(
    messages: tuple[Mapping[str, Any], ...], values: Mapping[str, Any], *, continues: bool = False
) -> ChatPrompt:
    """Return the conversation of these messages, with the tools of checked parameters.  Raises InvalidParameter."""
    choice, name = values.get("tool_choice", ("auto", None))
    tools = tuple(values.get("tools", ()))
    if choice == "required" and not tools:
        raise InvalidParameter("tool_choice", "tool_choice asks for a call, but there are no tools: give tools")
    if name is not None and name not in (known := [tool["function"]["name"] for tool in tools]):
        raise InvalidParameter("tool_choice", f"tool_choice names {name}: give one of {', '.join(known)}")
    return ChatPrompt(
        messages,
        values.get("chat_template_kwargs", {}),
        continues,
        reasoning_effort=values.get("reasoning_effort"),
        tools=tools,
        tool_choice=choice,
        required_tool=name,
        parallel_tool_calls=values.get("parallel_tool_calls", True),
    )


def _as_template_message(at: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
    if "content" not in message and not (message["role"] == "assistant" and message.keys() & SAID_OTHERWISE):
        raise InvalidParameter(f"messages[{at}].content", f"messages[{at}].content is missing: give the message's text")
    # OpenAI's role `developer` is called `system` in chat templates.
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role}


def _parse_prompts(prompt: Any, limits: GatewayLimits) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise InvalidParameter(
            "prompt", "the prompt is empty or of another type: give text, token ids, or a list of either"
        )
    if _are_token_ids(prompt):
        return (tuple(prompt),)
    if len(prompt) > limits.choices:
        raise Unsupported("prompt", f"the request has {len(prompt)} prompts: send at most {limits.choices}")
    if not all(isinstance(item, str) or _are_token_ids(item) for item in prompt):
        raise InvalidParameter(
            "prompt", "the prompt has items of another type: every item must be text or a list of token ids"
        )
    return tuple(item if isinstance(item, str) else tuple(item) for item in prompt)


def _are_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(item) is int for item in prompt)
