"""A gateway whose answers a test writes: the real pages, and scripted streams behind them."""

import asyncio
import contextlib
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from treeswarm_client.gateway.browser.page import front_page, make_files_app

Chunk = dict[str, Any]
Step = Chunk | asyncio.Event
"""A chunk to send, or an event to wait for before the next one."""
PARAMETERS = (
    "continue_final_message", "frequency_penalty", "max_tokens", "presence_penalty", "response_format", "seed",
    "stop", "temperature", "tool_choice", "tools", "top_k", "top_p",
)  # fmt: skip
ABOUT: Chunk = {
    "model": "demo",
    "locked": False,
    "ready": True,
    "why": "",
    "parameters": list(PARAMETERS),
    "nodes": 3,
    "blocks": 8,
    "context": 2048,
    "numerics": "float32",
    "chat": True,
    "draft": {"name": "demo-draft"},
}
ROUTE: Chunk = {
    "driver": None,
    "hops": [
        {"node": f"{i}{'ab' * 8}", "address": f"127.0.0.1:400{i}", "blocks": blocks}
        for i, blocks in enumerate(("0:3", "3:5", "5:8"), 1)
    ],
    "repairs": [],
}


@dataclass(frozen=True)
class Refused:
    """An answer that is an error from the beginning."""

    status: int
    message: str


CUT = "cut"
"""Step that ends a stream without its end."""
Script = Refused | Sequence[Step | str]


@dataclass(eq=False)
class ScriptedGateway:
    """A gateway that answers each request with the next script."""

    url: str = ""
    about: Chunk = field(default_factory=lambda: dict(ABOUT))
    key: str | None = None
    """API key that it demands, or None."""
    scripts: deque[Script] = field(default_factory=deque)
    requests: list[Chunk] = field(default_factory=list)
    """Bodies of the requests so far."""
    left: int = 0
    """Number of streams that the page left before their end."""

    def will(self, *scripts: Script) -> None:
        """Answer the next requests so."""
        self.scripts.extend(scripts)

    async def complete(self, request: Request) -> Response:
        """Answer a request for a text."""
        if not self._may(request):
            return _error(401, "this gateway needs an API key")
        self.requests.append({"path": request.url.path, **await request.json()})
        script = self.scripts.popleft()
        if isinstance(script, Refused):
            return _error(script.status, script.message)
        return StreamingResponse(self._stream(script), media_type="text/event-stream")

    async def _stream(self, script: Sequence[Step | str]) -> AsyncIterator[str]:
        ended = False
        try:
            for step in script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif step == CUT:
                    ended = True
                    return
                else:
                    yield f"data: {json.dumps(step)}\n\n"
            yield "data: [DONE]\n\n"
            ended = True
        finally:
            self.left += not ended

    def _may(self, request: Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    def make_app(self) -> FastAPI:
        """Return the application."""
        app = FastAPI(docs_url=None, redoc_url=None)
        app.add_api_route("/", front_page, methods=["GET"])
        app.mount("/pages", make_files_app("pages"))
        app.add_api_route("/v1/chat/completions", self.complete, methods=["POST"])
        app.add_api_route("/v1/completions", self.complete, methods=["POST"])

        @app.get("/about")
        async def about(request: Request) -> Response:
            return JSONResponse(self.about) if self._may(request) else _error(401, "no key")

        return app


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "", "param": None, "code": None}}, status)


@contextlib.asynccontextmanager
async def scripted_gateway() -> AsyncIterator[ScriptedGateway]:
    """Serve a scripted gateway on a free port of this machine."""
    gateway = ScriptedGateway()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gateway.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(gateway.make_app(), lifespan="off", log_level="error"))
        serving = asyncio.create_task(server._serve([listener]))  # `serve` would take over the signals of the tests
        try:
            yield gateway
        finally:
            server.should_exit = server.force_exit = True
            await serving


# ---------------------------------------------------------------- chunks


def delta(finish: str | None = None, note: Chunk | None = None, **content: Any) -> Chunk:
    """Return a chunk of a chat."""
    chunk: Chunk = {"choices": [{"index": 0, "delta": content, "finish_reason": finish}]}
    return chunk if note is None else chunk | {"treeswarm": note}


def make_round(number: int, words: Sequence[str]) -> Chunk:
    """Return the note of a round: a tree in which all words but the last are accepted, and each has a sibling."""
    parents = [-1, -1]
    for depth in range(1, len(words) - 1):
        parents += [2 * depth - 2] * 2
    kept = list(range(0, 2 * (len(words) - 1), 2))
    guesses = [word for accepted in words[:-1] for word in (accepted, " other")]
    parents = parents[: len(guesses)]
    return {
        "round": number, "traversal": number + 1, "nodes": len(guesses), "first": len(guesses), "parents": parents,
        "accepted": kept, "words": guesses, "bonus": words[-1], "ms": 81.4, "compute_ms": [4.2, 3.1, 5.0],
    }  # fmt: skip


def answer(
    text: str, per_traversal: int = 4, *, finish: str = "stop", pause: asyncio.Event | None = None
) -> list[Step]:
    """Return the chunks of an answer, word by word; it pauses before the second half, if asked to."""
    return list(_answer(text, per_traversal, finish, pause))


def _answer(text: str, per_traversal: int, finish: str, pause: asyncio.Event | None) -> Iterator[Step]:
    words = [word if i == 0 else f" {word}" for i, word in enumerate(text.split(" "))]
    yield delta(role="assistant", content="")
    yield delta(content=words[0], note={"traversal": 1, "tokens": 1, "route": ROUTE})
    groups = [words[i : i + per_traversal] for i in range(1, len(words), per_traversal)]
    sent = 1
    for number, group in enumerate(groups, 1):
        if pause is not None and number > len(groups) // 2:
            yield pause
        for i, word in enumerate(group):
            sent += 1
            note: Chunk = {"traversal": number + 1, "tokens": sent}
            yield delta(content=word, note=note if i else note | {"rounds": [make_round(number, group)]})
    time = {"draft": 0.1, "wire": 0.6, "queue": 0.0, "compute": 0.3}
    yield delta(finish, {"stats": {"time": time}})
    yield {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": sent}}
