"""The table of parameters as the page of the documentation and as OpenAPI's schemas.  Pure."""

from typing import Any

from treeswarm_client.gateway.parameters.checks import quote
from treeswarm_client.gateway.parameters.parameter import Api, Parameter, schema_of
from treeswarm_client.gateway.parameters.table import FORM, HONOURED, NEUTRAL, REFUSED, parameters_of

SCHEMAS = {
    Api.CHAT: "ChatRequest",
    Api.COMPLETIONS: "CompletionRequest",
    Api.RESPONSES: "ResponseRequest",
    Api.MESSAGES: "MessageRequest",
}
"""Names of the schemas of requests."""
EXAMPLES: dict[Api, dict[str, Any]] = {
    Api.CHAT: {"model": "demo", "messages": [{"role": "user", "content": "def main("}], "max_tokens": 32},
    Api.COMPLETIONS: {"model": "demo", "prompt": "def main(", "max_tokens": 32, "temperature": 0},
    Api.RESPONSES: {"model": "demo", "input": "def main(", "max_output_tokens": 32},
    Api.MESSAGES: {"model": "demo", "messages": [{"role": "user", "content": "def main("}], "max_tokens": 32},
}


def body_of(api: Api) -> dict[str, Any]:
    """Return what OpenAPI says of a route whose body is a request."""
    schema = {"$ref": f"#/components/schemas/{SCHEMAS[api]}"}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def request_schemas() -> dict[str, Any]:
    """Return the schemas of requests by name."""
    return {
        name: {"title": name, **schema_of(parameters_of(api)), "examples": [EXAMPLES[api]]}
        for api, name in SCHEMAS.items()
    }


def parameter_tables() -> str:
    """Return the tables of the documentation, in Markdown."""
    parts = [
        "Honoured:\n\n| parameter | in | meaning |\n|---|---|---|\n",
        *(f"| `{one.name}` | {_apis(one)} | {one.meaning} |\n" for one in HONOURED),
        "\nAccepted at the values that change nothing, and refused by name at others:\n\n",
        "| parameter | in | accepted | instead |\n|---|---|---|---|\n",
        *(f"| `{one.name}` | {_apis(one)} | {_values(one)} | {one.meaning} |\n" for one in (*REFUSED, *FORM)),
        "\nAccepted at every value, because none changes the text:\n\n",
        "| parameter | in | why |\n|---|---|---|\n",
        *(f"| `{one.name}` | {_apis(one)} | {one.meaning} |\n" for one in NEUTRAL),
    ]
    return "".join(parts)


def _apis(parameter: Parameter) -> str:
    apis = [api.value for api in SCHEMAS if api in parameter.apis]
    return "all" if len(apis) == len(SCHEMAS) else ", ".join(apis)


def _values(parameter: Parameter) -> str:
    return ", ".join(f"`{quote(value)}`" for value in parameter.neutral or ()) or "none"
