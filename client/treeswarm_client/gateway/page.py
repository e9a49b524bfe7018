"""The map's page: files beside this one, in a browser that may load nothing from anywhere else."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

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


@dataclass(frozen=True)
class Guarded:
    """Adds those headers to every answer."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, guarded)


def map_page() -> ASGIApp:
    """To be mounted."""
    return Guarded(StaticFiles(directory=Path(str(files("treeswarm_client.gateway") / "web")), html=True))
