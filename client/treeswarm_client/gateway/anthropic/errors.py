"""Errors in the form of Anthropic's API.  Pure."""

from typing import Any

from treeswarm_client.gateway.errors import Failure

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's `type` of an error, by status; others are `api_error`."""


def error_body(failure: Failure, request_id: str | None = None) -> dict[str, Any]:
    """Return Anthropic's error envelope."""
    kind = KINDS.get(failure.status, "api_error")
    body = {"type": "error", "error": {"type": kind, "message": failure.message}}
    return body if request_id is None else {**body, "request_id": request_id}
