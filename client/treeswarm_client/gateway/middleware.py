"""ASGI middleware: limits the size of requests, checks the host they name, counts them, notices callers who leave."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treeswarm.protocol.address import is_loopback
from treeswarm_client.gateway.errors import Failure

request_log = logging.getLogger("treeswarm_client.gateway.requests")

# Ids of callers that are taken over: short, and without anything that a log or a header could take for more.
SENDABLE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
# Status that is counted where the caller left before one was sent.
CLIENT_LEFT = 499


@dataclass(frozen=True)
class BodyLimit:
    """Refuses bodies of more than `max_bytes`, by their Content-Length header or by what arrives."""

    app: ASGIApp
    max_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.max_bytes:
            await self._refusal()(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, self._reason())  # FastAPI takes other errors for a broken body
            return message

        await self.app(scope, receive_counted, send)

    def _refusal(self) -> JSONResponse:
        failure = Failure(413, "invalid_request_error", self._reason())
        return JSONResponse(failure.body, failure.status)

    def _reason(self) -> str:
        return f"the request has more than {self.max_bytes} bytes: send less"


@dataclass(frozen=True)
class LocalHostOnly:
    """Answers only requests whose Host header names this machine; used where there are no API keys.

    This stops DNS rebinding: the request of a page from elsewhere carries that page's host name, even if the name was
    made to resolve to 127.0.0.1 after the page was loaded.
    """

    app: ASGIApp
    host: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        header = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        host = header.rsplit(":", 1)[0] if not header.endswith("]") else header
        if scope["type"] == "http" and host != self.host and not is_loopback(host.strip("[]")):
            failure = Failure(
                403, "invalid_request_error", f"this gateway does not answer at '{host}': use {self.host}"
            )
            await JSONResponse(failure.body, failure.status)(scope, receive, send)
            return
        await self.app(scope, receive, send)


@dataclass(frozen=True)
class RequestCounter:
    """Calls `count` for every response, with the route as declared and the status."""

    app: ASGIApp
    count: Callable[[str, int], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except Exception:  # an outer middleware answers it
            status = 500
            raise
        finally:
            self.count(getattr(scope.get("route"), "path", "other"), status)


@dataclass(frozen=True)
class RequestLog:
    """Gives every request an id, which its answer has in a header, and logs requests.

    The id is that of the caller's header `x-request-id`, if it has one that can be sent back.
    """

    app: ASGIApp
    log_requests: bool

    def __post_init__(self) -> None:
        if self.log_requests:
            request_log.setLevel(logging.INFO)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if SENDABLE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), CLIENT_LEFT

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(id_headers(request_id))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            if self.log_requests:
                method, path, seconds = scope["method"], scope["path"], time.monotonic() - started
                request_log.info("%s %s %d in %.3f s, request %s", method, quote(path), status, seconds, request_id)


def id_headers(request_id: str) -> dict[str, str]:
    """Return the headers that name a request, under OpenAI's name and under Anthropic's."""
    return {"x-request-id": request_id, "request-id": request_id}


async def run_unless_disconnected(request: Request, work: Awaitable[None]) -> bool:
    """Do the work and return True, or cancel it and return False if the caller disconnects first.

    Raises what the work raises.
    """
    working = asyncio.ensure_future(work)
    disconnecting = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, disconnecting):
            task.cancel()
        await asyncio.wait({working, disconnecting})
        if not working.cancelled():
            working.exception()  # read, so that asyncio does not log it: the caller is gone


async def _wait_for_disconnect(request: Request) -> None:
    message: dict[str, Any] = {}
    while message.get("type") != "http.disconnect":
        message = dict(await request.receive())
