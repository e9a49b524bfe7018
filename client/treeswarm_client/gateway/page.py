"""What a browser is shown, which may load nothing from anywhere else: the front page; the map, files beside this."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Strangers' words are on that page: were one of them ever taken for markup, it could still do nothing.
POLICY = "default-src 'none'; {}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'".format(
    "; ".join(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect"))
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked again each time, and not sent again: a gateway's update shows at once
}

VARY = {"Vary": "Accept"}
# Relative, so that they lead there through a reverse proxy that adds a prefix too.
FRONT = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><title>treeswarm</title></head><body>'
    "<h1>treeswarm</h1><ul>"
    '<li><a href="map/">map</a>: who serves what, and trees as they grow</li>'
    "<li><code>/v1</code>: the base URL for programs that speak OpenAI's API</li>"
    '<li><a href="health">/health</a>: whether this process lives; <a href="ready">/ready</a>: the swarm too</li>'
    "</ul></body></html>"
)


def front_page(request: Request) -> Response:
    """Where to go from here: for whoever takes a page, and as JSON for all others."""
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(FRONT, headers=HEADERS | VARY)
    return JSONResponse({"map": "/map/", "openai": "/v1", "health": "/health", "ready": "/ready"}, headers=VARY)


@dataclass(frozen=True)
class SecurityHeaders:
    """Adds those headers to every answer."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, guarded)


def make_map_app() -> ASGIApp:
    """To be mounted."""
    return SecurityHeaders(StaticFiles(directory=Path(str(files("treeswarm_client.gateway") / "web")), html=True))
