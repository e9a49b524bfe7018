"""The pages for browsers, which may load nothing from elsewhere: the front page and the map in `web/`."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The map shows text from unknown nodes.  Even if it were taken for markup by mistake, it could do nothing.
POLICY = "default-src 'none'; {}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'".format(
    "; ".join(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect"))
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Browsers ask each time whether a file has changed, so that an update of the gateway shows at once.
    "Cache-Control": "no-cache",
}

VARY = {"Vary": "Accept"}
# The links are relative, so that they also work behind a reverse proxy that adds a prefix.
FRONT = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><title>treeswarm</title></head><body>'
    "<h1>treeswarm</h1><ul>"
    '<li><a href="map/">map</a>: the nodes, their blocks, and draft trees as they grow</li>'
    "<li><code>/v1</code>: the base URL for clients of the OpenAI API</li>"
    '<li><a href="health">/health</a>: whether this process runs; <a href="ready">/ready</a>: whether the swarm is '
    "complete</li>"
    "</ul></body></html>"
)


def front_page(request: Request) -> Response:
    """Return links to everything here: as a page for browsers, as JSON for other programs."""
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(FRONT, headers=HEADERS | VARY)
    return JSONResponse({"map": "/map/", "openai": "/v1", "health": "/health", "ready": "/ready"}, headers=VARY)


@dataclass(frozen=True)
class SecurityHeaders:
    """Middleware that adds `HEADERS` to every response."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


def make_map_app() -> ASGIApp:
    """Return the map's files as an application to mount."""
    return SecurityHeaders(StaticFiles(directory=Path(str(files("treeswarm_client.gateway") / "web")), html=True))
