"""OpenAI's requests for responses, translated into a `GenerationRequest`.  Pure."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.generation_request import GenerationRequest
from treeswarm_client.gateway.openai.requests import make_chat, make_request
from treeswarm_client.gateway.parameters.parameter import Api
from treeswarm_client.gateway.parameters.table import read_request

# Value of `include` that asks for log-probabilities.
LOGPROBS = "message.output_text.logprobs"


def parse_responses_request(body: Mapping[str, Any], limits: GatewayLimits) -> GenerationRequest:
    """Translate a request.  Raises InvalidParameter and Unsupported."""
    values = read_request(body, Api.RESPONSES)
    instructions = [{"role": "system", "content": values["instructions"]}] if values.get("instructions") else []
    wants_top = bool(values.get("top_logprobs"))
    request = make_request(
        values,
        limits,
        chat=make_chat((*instructions, *values["input"]), {**values, **_effort_of(values)}),
        max_tokens=values.get("max_output_tokens"),
        default_max_tokens=limits.max_tokens,
        logprobs=values.get("top_logprobs", 0) if LOGPROBS in values.get("include", ()) or wants_top else None,
    )
    return replace(request, answer=replace(request.answer, include_usage=True))


def _effort_of(values: Mapping[str, Any]) -> dict[str, str]:
    effort = values.get("reasoning", {}).get("effort")
    return {} if effort is None else {"reasoning_effort": effort}
