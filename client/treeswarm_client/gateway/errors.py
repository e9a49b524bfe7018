"""Errors as callers receive them: OpenAI's error envelope, and the matching HTTP status."""

from dataclasses import dataclass, replace
from typing import Any

from treeswarm.errors import (
    BadRequest,
    MissingBlocks,
    ModelError,
    NodeLost,
    RecordsRejected,
    Refused,
    RouteError,
    SwarmError,
    TooLong,
    TransportError,
    Unreachable,
    WrongClock,
)
from treeswarm_client.discovery.failures import FULL
from treeswarm_client.gateway.events import AnswerAborted
from treeswarm_client.gateway.generation_request import ParameterError


class Busy(SwarmError):
    """The gateway, or every node, has reached its limit."""


class NotReady(SwarmError):
    """There is no complete swarm yet, for `reason` if there is one."""

    def __init__(self, message: str, reason: SwarmError | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class WrongKey(SwarmError):
    """The request has no API key, or an unknown one."""


class MalformedBody(BadRequest):
    """The body of a request is no JSON object."""


class NoSuchModel(SwarmError):
    """The request names a model that is not served here."""


@dataclass(frozen=True)
class Failure:
    """One error as an HTTP response."""

    status: int
    kind: str
    """OpenAI's `type` of the error."""
    message: str
    code: str | None = None
    param: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error envelope."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the status."""
        match self.status:
            case 401:
                return {"WWW-Authenticate": "Bearer"}
            case 429 | 503:
                return {"Retry-After": "2"}
            case _:
                return {}


INTERNAL = Failure(500, "server_error", "an internal error occurred: see the gateway's log")

# Error class, status, type, code and parameter.  The first match counts: a class stands before its parents.
_RESPONSES: tuple[tuple[type[SwarmError], int, str, str | None, str | None], ...] = (
    (BadRequest, 400, "invalid_request_error", None, None),
    (WrongKey, 401, "invalid_request_error", "invalid_api_key", None),
    (NoSuchModel, 404, "invalid_request_error", "model_not_found", "model"),
    (Busy, 429, "rate_limit_error", "rate_limit_exceeded", None),
    (AnswerAborted, 503, "server_error", "swarm_unavailable", None),
    (MissingBlocks, 503, "server_error", "missing_blocks", None),
    (NotReady, 503, "server_error", "swarm_unavailable", None),
    (RecordsRejected, 503, "server_error", "records_rejected", None),
    (WrongClock, 503, "server_error", "wrong_clock", None),
    (RouteError, 503, "server_error", "swarm_unavailable", None),
    (Unreachable, 503, "server_error", "unreachable", None),
    (TransportError, 503, "server_error", "swarm_unavailable", None),
    (NodeLost, 503, "server_error", "swarm_unavailable", None),
    (ModelError, 500, "server_error", "model_error", None),
    (SwarmError, 502, "server_error", "swarm_error", None),
)


def failure_of(error: SwarmError, text_param: str | None = None) -> Failure:
    """Return the response for an error; `text_param` is the parameter that holds the text, if it is known."""
    if isinstance(error, ParameterError):
        return Failure(400, "invalid_request_error", str(error), error.code, error.param)
    if isinstance(error, Refused) and error.code in FULL:
        return Failure(429, "rate_limit_error", str(error), "swarm_full")
    if isinstance(error, NotReady) and error.reason is not None:
        return replace(failure_of(error.reason), status=503)
    if isinstance(error, TooLong):
        return Failure(400, "invalid_request_error", str(error), "context_length_exceeded", text_param)
    _, status, kind, code, param = next(response for response in _RESPONSES if isinstance(error, response[0]))
    return Failure(status, kind, str(error), code, param)
