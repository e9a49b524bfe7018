"""OpenAI's requests, checked, and turned into a `GenerationRequest`.

A parameter that changes the text and cannot be honoured is refused.  One that has no effect at its value is accepted.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.generation_request import GenerationRequest, Unsupported

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_STOPS = 16
# Number of new tokens of a completion that names no limit: OpenAI's default.
DEFAULT_COMPLETION_TOKENS = 16
LARGEST_SEED = 2**63

# Parameters that are accepted while they have no effect, with the values that have none; None stands for any value.
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
    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    include_usage: bool = False
    """Whether the stream ends with a chunk that counts the tokens."""


class ContentPart(BaseModel):
    """One part of a message's content."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: str
    """Kind of the part: `text`, no other."""
    text: str | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    role: str
    """One of `system`, `developer`, `user`, `assistant` and `tool`."""
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None


class _CommonRequest(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str
    """Name of the model, one of `/v1/models`."""
    n: int | None = Field(default=None, ge=1)
    """Number of samples, generated side by side."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events."""
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    """Texts before the first of which the answer ends."""
    seed: int | None = None
    """Seed of the samples; without one, each answer differs."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Sampling temperature, 1 by default; 0 is greedy."""
    top_p: Probability | None = None
    """Smallest set of tokens with this probability is sampled from; 1 by default."""
    top_k: int | None = Field(default=None, ge=-1)
    """Number of best tokens that are sampled from, as in Hugging Face; 0 and -1 stand for all."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Largest number of new tokens.  Room for them is reserved on the nodes."""
    ignore_eos: bool = False
    """Whether to continue past the model's end token."""


class ChatRequest(_CommonRequest):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "demo", "messages": [{"role": "user", "content": "def main("}], "max_tokens": 32}]
        }
    )

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    """The conversation so far."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Whether the answer has the log-probability of each token."""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """Number of other tokens with their log-probabilities: 0, because nodes send none."""


class CompletionRequest(_CommonRequest):
    """`POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "demo", "prompt": "def main(", "max_tokens": 32, "temperature": 0}]}
    )

    # Checked by hand: pydantic would report a union's errors for every item and every type.
    prompt: Any
    """Text, token ids, or a list of either."""
    logprobs: int | None = Field(default=None, ge=0, le=5)
    """0 for the log-probabilities of the tokens of the answer."""


def parse_chat_request(request: ChatRequest, limits: GatewayLimits) -> GenerationRequest:
    """Check a chat request.  Raises Unsupported and BadRequest."""
    _refuse_extras(request)
    if request.top_logprobs:
        raise Unsupported(
            "top_logprobs",
            f"top_logprobs is {request.top_logprobs}: nodes send the probability of the chosen token only; give 0",
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise Unsupported("top_logprobs", "top_logprobs is given without logprobs: add logprobs: true, or leave it out")
    return _make_request(
        request,
        limits,
        messages=tuple(_parse_message(message) for message in request.messages),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        default_max_tokens=limits.max_tokens,
        logprobs=bool(request.logprobs),
    )


def parse_completion_request(request: CompletionRequest, limits: GatewayLimits) -> GenerationRequest:
    """Check a completion request.  Raises Unsupported and BadRequest."""
    _refuse_extras(request)
    if request.logprobs and (request.logprobs > 1 or request.temperature != 0):
        raise Unsupported(
            "logprobs", f"logprobs is {request.logprobs}: nodes send the probability of the chosen token only; give 0"
        )
    return _make_request(
        request,
        limits,
        prompts=_parse_prompts(request.prompt, limits),
        max_tokens=request.max_tokens,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=request.logprobs is not None,
    )


def _make_request(
    request: _CommonRequest,
    limits: GatewayLimits,
    *,
    max_tokens: int | None,
    default_max_tokens: int,
    logprobs: bool,
    prompts: tuple[str | tuple[int, ...], ...] = (),
    messages: tuple[Mapping[str, Any], ...] = (),
) -> GenerationRequest:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    temperature = 1.0 if request.temperature is None else request.temperature
    options = {
        "temperature": temperature,
        # OpenAI allows 0, which keeps the most likely token only; the smallest positive p does the same.
        "top_p": max(1e-6, 1.0 if request.top_p is None else request.top_p),
        "top_k": max(0, request.top_k or 0),
        "seed": secrets.randbits(48) if request.seed is None else request.seed % LARGEST_SEED,
        "stop": tuple(stops),
        "ignore_eos": request.ignore_eos,
    }
    parsed = GenerationRequest(
        prompts=prompts,
        messages=messages,
        n=request.n or 1,
        options=options,
        max_tokens=max_tokens,
        default_max_tokens=default_max_tokens,
        stream=bool(request.stream),
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
        logprobs=logprobs,
    )
    if parsed.choices > limits.choices:
        raise Unsupported("n", f"the request asks for {parsed.choices} choices: ask for at most {limits.choices}")
    return parsed


def _refuse_extras(request: BaseModel) -> None:
    for name, value in (request.model_extra or {}).items():
        neutral = NEUTRAL.get(name, ())
        if value is not None and neutral is not None and value not in neutral:
            reason = "cannot be honoured with this value" if name in NEUTRAL else "is not known here"
            raise Unsupported(name, f"the parameter {name} {reason}: leave it out")


def _parse_message(message: ChatMessage) -> Mapping[str, Any]:
    content = message.content
    if isinstance(content, list):
        if other := next((part.type for part in content if part.type != "text"), None):
            raise Unsupported("messages", f"content of type {other} cannot be honoured: this model reads text only")
        content = "".join(part.text or "" for part in content)
    # OpenAI's role `developer` is called `system` in chat templates.
    role = "system" if message.role == "developer" else message.role
    return {**(message.model_extra or {}), "role": role, "content": content or ""}


def _parse_prompts(prompt: Any, limits: GatewayLimits) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise Unsupported("prompt", "the prompt is empty or of another type: give text, token ids, or a list of either")
    if _are_token_ids(prompt):
        return (tuple(prompt),)
    if len(prompt) > limits.choices:
        raise Unsupported("prompt", f"the request has {len(prompt)} prompts: send at most {limits.choices}")
    if not all(isinstance(item, str) or _are_token_ids(item) for item in prompt):
        raise Unsupported(
            "prompt", "the prompt has items of another type: every item must be text or a list of token ids"
        )
    return tuple(item if isinstance(item, str) else tuple(item) for item in prompt)


def _are_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(item) is int for item in prompt)
