"""The pages for browsers, which load nothing from elsewhere: in `pages`, and the map's programs in `web`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treeswarm_client.client import SwarmClient
from treeswarm_client.gateway.config import GatewayConfig
from treeswarm_client.gateway.parameters.documents import request_schemas
from treeswarm_client.gateway.parameters.parameter import Api
from treeswarm_client.gateway.parameters.table import parameters_of

# The pages show text from unknown nodes.  Even if it were taken for markup by mistake, it could do nothing; and where a
# browser knows trusted types, it refuses to take any text for markup.
POLICY = "default-src 'none'; {}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; {}".format(
    "; ".join(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
    "require-trusted-types-for 'script'; trusted-types 'none'",
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Browsers ask each time whether a file has changed, so that an update of the gateway shows at once.
    "Cache-Control": "no-cache",
}

VARY = {"Vary": "Accept"}
ROUTES = {"map": "/map/", "openai": "/v1", "docs": "/docs", "health": "/health", "ready": "/ready"}
HOME = Path(str(files("treeswarm_client.gateway")))
# What stands in the file of a page between the bar at its top and the rest.
MAIN = "<!-- main -->\n"


def front_page(request: Request) -> Response:
    """Return the page to chat on for browsers, and links to everything here as JSON for other programs."""
    if "text/html" in request.headers.get("accept", ""):
        page = _page("chat", "treeswarm", "pages/chat/main.js", ("pages/chat/chat.css", "pages/chat/prose.css"))
        return HTMLResponse(page, headers=HEADERS | VARY)
    return JSONResponse(ROUTES, headers=VARY)


def docs_page() -> Response:
    """Return the page of the API, which draws the OpenAPI schema."""
    page = _page("docs", "treeswarm · API", "pages/docs.js", ("pages/docs.css",), needs_key=False)
    return HTMLResponse(page, headers=HEADERS)


def map_page() -> Response:
    """Return the map."""
    page = _page("map", "treeswarm · map", "map/map.js", ("map/map.css",), root="../")
    return HTMLResponse(page, headers=HEADERS)


@cache
def _page(name: str, title: str, script: str, styles: Sequence[str], *, root: str = "", needs_key: bool = True) -> str:
    """Return a page in the shell that all share; `root` leads from its address to the first page.

    The file of a page is its body, or its part of the bar at the top and what is below it.  With `needs_key` the page
    asks for an API key where the gateway has keys.
    """
    bar, marker, main = _read(name).partition(MAIN)
    body = Template(_read("frame")).substitute(root=root, bar=bar, main=main) if marker else bar
    links = "\n".join(f'<link rel="stylesheet" href="{root}{style}">' for style in ("pages/shared/base.css", *styles))
    return Template(_read("shell")).substitute(
        title=title, root=root, script=script, styles=links, body=body, dialog=_read("key") if needs_key else ""
    )


def _read(name: str) -> str:
    return (HOME / "pages" / f"{name}.html").read_text("utf-8")


def describe_gateway(config: GatewayConfig, client: SwarmClient | None, why: str) -> dict[str, Any]:
    """Return what the pages say about the gateway.

    `client` is None while there is no complete swarm; `why` says why there is none now, or is empty.
    """
    known = {
        "model": config.model_names[0],
        "locked": bool(config.keys.digests),
        "ready": client is not None,
        "why": why,
        "parameters": [one.name for one in parameters_of(Api.CHAT) if one.check is not None],
    }
    if client is None:
        return known
    return known | {
        "nodes": len(client.view.snapshot),
        "blocks": client.target.blocks,
        "context": client.target.max_positions,
        "numerics": str(client.target.numerics),
        "chat": client.has_chat_template,
        "draft": client.draft_choice.as_dict(),
    }


def make_schema(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """Return the OpenAPI schema: of the answers that this gateway really gives, which are OpenAI's errors."""
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for methods in schema["paths"].values():
        for route in methods.values():
            route["responses"].pop("422", None)  # FastAPI's own, in place of which 400 is sent
            route["responses"]["default"] = {"$ref": "#/components/responses/Error"}
    components = schema.setdefault("components", {})
    for name in ("HTTPValidationError", "ValidationError"):
        components.get("schemas", {}).pop(name, None)
    error = {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")}
    body = {"type": "object", "properties": {"error": {"type": "object", "properties": error}}}
    components.setdefault("schemas", {}).update(request_schemas())
    components["responses"] = {
        "Error": {"description": "An error as OpenAI sends it", "content": {"application/json": {"schema": body}}}
    }
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema | {"x-needs-key": needs_key}


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


def make_files_app(folder: str) -> ASGIApp:
    """Return the files of a folder of this package as an application to mount."""
    return SecurityHeaders(StaticFiles(directory=HOME / folder))
