"""At the socket: how much a caller may send, whether he is still there, and what he was told in the end."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treeswarm.protocol.address import is_loopback
from treeswarm_client.gateway.errors import Failure


@dataclass(frozen=True)
class BodyLimit:
    """Refuses bodies of more than `most` bytes, by what they announce or by what comes."""

    app: ASGIApp
    most: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.most:
            await self._refuse()(scope, receive, send)
            return
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.most:
                raise HTTPException(413, self._why())  # the one kind of error that is not taken for a broken body
            return message

        await self.app(scope, counted, send)

    def _refuse(self) -> JSONResponse:
        failure = Failure(413, "invalid_request_error", self._why())
        return JSONResponse(failure.body, failure.status)

    def _why(self) -> str:
        return f"the request has more than {self.most} bytes: send less"


@dataclass(frozen=True)
class LocalHostOnly:
    """Without keys, answers those alone who name this machine: a page from elsewhere, whose name was made to mean
    127.0.0.1 after it was loaded, names another."""

    app: ASGIApp
    host: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        host = named.rsplit(":", 1)[0] if not named.endswith("]") else named
        if scope["type"] == "http" and host != self.host and not is_loopback(host.strip("[]")):
            failure = Failure(403, "invalid_request_error", f"this gateway answers at {self.host}, not at '{host}'")
            await JSONResponse(failure.body, failure.status)(scope, receive, send)
            return
        await self.app(scope, receive, send)


@dataclass(frozen=True)
class RequestCounter:
    """Tells of every answer: its route, as declared, and its status."""

    app: ASGIApp
    tell: Callable[[str, int], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:  # answered further out
            status = 500
            raise
        finally:
            self.tell(getattr(scope.get("route"), "path", "other"), status)


async def run_unless_disconnected(request: Request, work: Awaitable[None]) -> bool:
    """Do the work, unless the caller leaves before it is done: then it is cancelled.  Whether it was done; raises what
    it raises."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})
        if not working.cancelled():
            working.exception()  # heard: whoever left needs no answer


async def _left(request: Request) -> None:
    message: dict[str, Any] = {}
    while message.get("type") != "http.disconnect":
        message = dict(await request.receive())
