"""The one form of request that the gateway works on; the requests of every API are translated into it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from treeswarm.errors import BadRequest

# Number of characters of a parameter's name that an error repeats.
LONGEST_NAME = 80


class ParameterError(BadRequest):
    """A parameter that is wrong; `param` is its outermost name."""

    code: str | None = None
    """OpenAI's `code` of the error."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        # JSON can carry lone surrogates, which UTF-8 cannot.
        self.param = re.split(r"[.\[]", name, maxsplit=1)[0][:LONGEST_NAME].encode("utf-8", "replace").decode()


class InvalidParameter(ParameterError):
    """A parameter whose value has another type, or is out of range."""


class Unsupported(ParameterError):
    """A parameter that this gateway cannot honour."""

    code = "unsupported_parameter"


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation, and how the model's template writes it."""

    messages: tuple[Mapping[str, Any], ...]
    """Messages as the template takes them."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template."""
    continues: bool = False
    """Whether the answer goes on with the last message."""
    reasoning_effort: str | None = None
    """OpenAI's word for how much the model thinks, or None."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the model may call, as OpenAI's objects."""
    tool_choice: str = "auto"
    """One of `auto`, `none` and `required`."""
    required_tool: str | None = None
    """Name of the one tool that must be called, or None."""
    parallel_tool_calls: bool = True
    """Whether an answer may call several tools."""


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen.  What a request does not name is decided by the model's generation config."""

    settings: Mapping[str, Any]
    """Those of `temperature`, `top_p` and `top_k` that the request names, as options of `SwarmClient.stream`."""
    seed: int
    rules: Mapping[str, Any]
    """Fields of `TextRules` that the request names."""
    bad_words: tuple[str, ...] = ()
    """Texts that must not occur; their tokens become part of the rules."""


@dataclass(frozen=True)
class EndOptions:
    """What ends an answer."""

    max_tokens: int | None = None
    """Number of new tokens, or None if the request names none."""
    is_wish: bool = False
    """Whether `max_tokens` counts as not named where the context has no room for so many."""
    default_max_tokens: int | None = None
    """Number of new tokens where the request names none, or None for as many as fit."""
    stops: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    """Whether to continue past the model's end token."""


@dataclass(frozen=True)
class AnswerOptions:
    """What of an answer is sent, and how."""

    stream: bool = False
    """Whether the answer is sent as server-sent events."""
    include_usage: bool = False
    """Whether a stream ends with a chunk that counts its tokens."""
    include_traversals: bool = False
    """Whether each chunk of a stream says which traversal brought it, with the trees and the route."""
    logprobs: int | None = None
    """Number of likeliest tokens with their log-probabilities beside each token's own, or None for none at all."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    shows_prompt_logprobs: bool = False
    """Whether those are sent in vLLM's form."""
    echo: bool = False
    """Whether the answer begins with the prompt."""


@dataclass(frozen=True)
class GenerationRequest:
    """One request as the gateway works on it: every prompt is continued `n` times."""

    sampling: SamplingOptions
    ends: EndOptions
    answer: AnswerOptions
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Prompts as texts or token ids; empty if there is a conversation."""
    chat: ChatPrompt | None = None
    """The conversation to continue, or None if there are prompts."""
    n: int = 1
    """Number of choices per prompt."""

    @property
    def choices(self) -> int:
        """Number of generations that the request needs."""
        return max(1, len(self.prompts)) * self.n
