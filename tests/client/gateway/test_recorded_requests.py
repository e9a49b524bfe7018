"""What well-known client packages send by default: recorded requests are answered, or refused for what they ask."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.scripted_client import ScriptedClient, scripted_http

from treeswarm_client.gateway.parameters.parameter import Api
from treeswarm_client.gateway.parameters.table import parameters_of

RECORDED: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("recorded_requests.jsonl").read_text("utf-8").splitlines()
]
APIS = {
    "/v1/chat/completions": Api.CHAT, "/v1/completions": Api.COMPLETIONS, "/v1/responses": Api.RESPONSES,
    "/v1/messages": Api.MESSAGES,
}  # fmt: skip


def refused_parameters(api: Api, body: dict[str, Any]) -> set[str]:
    """Return the parameters of a request that the table does not honour at their values."""
    known = {parameter.name: parameter for parameter in parameters_of(api)}
    return {
        name
        for name, value in body.items()
        if known[name].check is None and value not in (known[name].neutral or (value,))
    }


@pytest.mark.parametrize("recorded", RECORDED, ids=[f"{one['client']} {one['path']}" for one in RECORDED])
async def test_recorded_request_is_answered(recorded: dict[str, Any]) -> None:
    async with scripted_http(ScriptedClient("Hello there.")) as http:
        answer = await http.post(recorded["path"], json=recorded["body"])
    refused = refused_parameters(APIS[recorded["path"]], recorded["body"])
    if not refused:
        assert answer.status_code == 200, answer.text
        return
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in refused
