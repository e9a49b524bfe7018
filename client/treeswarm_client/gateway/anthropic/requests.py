"""Anthropic's requests for messages, translated into a `GenerationRequest`.  Pure."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.generation_request import GenerationRequest
from treeswarm_client.gateway.openai.requests import make_chat, make_request
from treeswarm_client.gateway.parameters.parameter import Api
from treeswarm_client.gateway.parameters.table import read_request


def parse_messages_request(
    body: Mapping[str, Any], limits: GatewayLimits, *, counts: bool = False
) -> GenerationRequest:
    """Translate a request; one that only counts its tokens need not say how long the answer may be.

    Raises InvalidParameter and Unsupported.
    """
    values = read_request({"max_tokens": 1, **body} if counts else body, Api.MESSAGES)
    system = [{"role": "system", "content": values["system"]}] if values.get("system") else []
    messages = (*system, *values["messages"])
    request = make_request(
        values | {"stop": values.get("stop_sequences", [])},
        limits,
        # As in Anthropic's API, the answer goes on with a last message of the assistant.
        chat=make_chat(messages, _with_tools(values), continues=messages[-1]["role"] == "assistant"),
        max_tokens=values["max_tokens"],
        default_max_tokens=limits.max_tokens,
        logprobs=None,
    )
    # Programs must give `max_tokens`, and give what Anthropic's models take: 4,096, 16,384 or 128,000 by default.
    return replace(request, ends=replace(request.ends, is_wish=True))


def _with_tools(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with Anthropic's choice of tools and thinking under OpenAI's names."""
    mode, name, parallel = values.get("tool_choice", ("auto", None, True))
    effort = {"reasoning_effort": values["thinking"]} if values.get("thinking") else {}
    return {**values, **effort, "tool_choice": (mode, name), "parallel_tool_calls": parallel}
