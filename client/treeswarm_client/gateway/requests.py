"""What callers send: OpenAI's requests, checked, and turned into an `GenerationRequest`.

A parameter that changes the text and cannot be honoured is refused; what has no effect at the value given is accepted.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from treeswarm.errors import BadRequest
from treeswarm_client.gateway.config import GatewayLimits

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_STOPS = 16
# OpenAI's default where a completion names no limit.
DEFAULT_COMPLETION_TOKENS = 16
LARGEST_SEED = 2**63

# Parameters accepted as long as they ask for nothing, with the values that do; None: any value.
NEUTRAL: Mapping[str, tuple[Any, ...] | None] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": None,
    "modalities": (["text"],),
    "parallel_tool_calls": None,
    "presence_penalty": (0,),
    "prompt_cache_key": None,
    "response_format": ({"type": "text"},),
    "safety_identifier": None,
    "service_tier": None,
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "user": None,
}

Probability = Annotated[float, Field(ge=0, le=1)]
StopString = Annotated[str, Field(max_length=256)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class ContentPart(BaseModel):
    """Of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None


class _CommonRequest(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    n: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: Probability | None = None
    top_k: int | None = Field(default=None, ge=-1)
    max_tokens: int | None = Field(default=None, ge=1)
    ignore_eos: bool = False


class ChatRequest(_CommonRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)


class CompletionRequest(_CommonRequest):
    """`POST /v1/completions`."""

    prompt: Any
    """Text, token ids, or a list of either; a union's errors would be told for every item of every kind."""
    logprobs: int | None = Field(default=None, ge=0, le=5)


class Unsupported(BadRequest):
    """A parameter that this gateway cannot honour."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class GenerationRequest:
    """One request, as the gateway works on it: every prompt is continued `n` times."""

    prompts: tuple[str | tuple[int, ...], ...]
    """Texts or token ids; none where there are messages."""
    messages: tuple[Mapping[str, Any], ...]
    n: int
    options: Mapping[str, Any]
    """Of `SwarmClient.stream`."""
    wanted: int | None
    """New tokens; None: as many as fit, up to `usual`."""
    usual: int
    stream: bool
    include_usage: bool
    logprobs: bool

    def max_new_tokens(self, room: int) -> int:
        """Where the context has `room` for more tokens."""
        return self.wanted or max(1, min(self.usual, room))

    @property
    def choices(self) -> int:
        """Generations it needs."""
        return max(1, len(self.prompts)) * self.n


def parse_chat_request(request: ChatRequest, limits: GatewayLimits) -> GenerationRequest:
    """Raises Unsupported and BadRequest."""
    _refuse_extras(request)
    if request.top_logprobs:
        raise Unsupported("top_logprobs", "top_logprobs: nodes tell the probability of the chosen token only; give 0")
    if request.top_logprobs is not None and not request.logprobs:
        raise Unsupported("top_logprobs", "top_logprobs is only allowed with logprobs: true")
    wanted = request.max_completion_tokens or request.max_tokens
    messages = tuple(_message(one) for one in request.messages)
    return _ask(request, (), messages, wanted, usual=limits.max_tokens, logprobs=bool(request.logprobs), limits=limits)


def parse_completion_request(request: CompletionRequest, limits: GatewayLimits) -> GenerationRequest:
    """Raises Unsupported and BadRequest."""
    _refuse_extras(request)
    if request.logprobs and (request.logprobs > 1 or request.temperature != 0):
        raise Unsupported("logprobs", "logprobs: nodes tell the probability of the chosen token only; give 0")
    prompts = _prompts(request.prompt, limits)
    logprobs = request.logprobs is not None
    return _ask(
        request, prompts, (), request.max_tokens, usual=DEFAULT_COMPLETION_TOKENS, logprobs=logprobs, limits=limits
    )


def _ask(
    request: _CommonRequest,
    prompts: tuple[str | tuple[int, ...], ...],
    messages: tuple[Mapping[str, Any], ...],
    wanted: int | None,
    *,
    usual: int,
    logprobs: bool,
    limits: GatewayLimits,
) -> GenerationRequest:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    temperature = 1.0 if request.temperature is None else request.temperature
    options = {
        "temperature": temperature,
        # OpenAI allows 0, which keeps only the likeliest: the smallest p does the same.
        "top_p": max(1e-6, 1.0 if request.top_p is None else request.top_p),
        "top_k": max(0, request.top_k or 0),
        "seed": secrets.randbits(48) if request.seed is None else request.seed % LARGEST_SEED,
        "stop": tuple(stops),
        "ignore_eos": request.ignore_eos,
    }
    made = GenerationRequest(
        prompts,
        messages,
        request.n or 1,
        options,
        wanted,
        usual,
        bool(request.stream),
        request.stream_options is not None and request.stream_options.include_usage,
        logprobs,
    )
    if made.choices > limits.choices:
        raise Unsupported("n", f"{made.choices} choices were asked for, at most {limits.choices} go into one request")
    return made


def _refuse_extras(request: BaseModel) -> None:
    for name, value in (request.model_extra or {}).items():
        allowed = NEUTRAL.get(name, ())
        if value is not None and allowed is not None and value not in allowed:
            known = "cannot be honoured with this value" if name in NEUTRAL else "is not known here"
            raise Unsupported(name, f"the parameter {name} {known}: leave it out")


def _message(message: ChatMessage) -> Mapping[str, Any]:
    content = message.content
    if isinstance(content, list):
        if other := next((part.type for part in content if part.type != "text"), None):
            raise Unsupported("messages", f"content of type {other} cannot be honoured: this model reads text")
        content = "".join(part.text or "" for part in content)
    # What OpenAI calls developer, templates call system.
    role = "system" if message.role == "developer" else message.role
    return {**(message.model_extra or {}), "role": role, "content": content or ""}


def _prompts(prompt: Any, limits: GatewayLimits) -> tuple[str | tuple[int, ...], ...]:
    """Raises Unsupported."""
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise Unsupported("prompt", "the prompt must be a text, a list of token ids, or a list of either; not empty")
    if _are_ids(prompt):
        return (tuple(prompt),)
    if len(prompt) > limits.choices:
        raise Unsupported("prompt", f"{len(prompt)} prompts were sent, at most {limits.choices} go into one request")
    if not all(isinstance(one, str) or _are_ids(one) for one in prompt):
        raise Unsupported("prompt", "every prompt must be a text or a list of token ids")
    return tuple(one if isinstance(one, str) else tuple(one) for one in prompt)


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(one) is int for one in prompt)
