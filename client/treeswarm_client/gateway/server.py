"""The gateway's life: the swarm outside, the web server inside, both ended by a signal."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn

from treeswarm.errors import BadRequest
from treeswarm.protocol.address import Address
from treeswarm_client.gateway.app import make_app
from treeswarm_client.gateway.backend import Backend

# A stream under way has so long to end after a signal, and then so long to say why it did not.
GRACE_S = 3.0
LAST_WORDS_S = 7
BACKLOG = 1024


class _Server(uvicorn.Server):
    """uvicorn would raise a signal again when it has ended, and a SIGTERM would look like a crash."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run_gateway(backend: Backend, *, log_requests: bool = False) -> int:
    """Serve until SIGINT or SIGTERM; prints where, once it listens.  Raises BadRequest and ModelError."""
    with _listening(backend.config.listen) as (listener, address):
        settings = uvicorn.Config(
            make_app(backend),
            lifespan="off",
            log_level="info" if log_requests else "warning",
            access_log=log_requests,
            timeout_graceful_shutdown=int(GRACE_S) + LAST_WORDS_S,
            server_header=False,
        )
        server = _Server(settings)

        serving = asyncio.ensure_future(_serve(backend, server, listener, address))

        def stop() -> None:
            """Once, it takes leave; before it serves, or twice, it ends."""
            if server.started and not server.should_exit:
                server.should_exit = True
                backend.stop(GRACE_S)
            elif server.started:
                server.force_exit = True
            else:
                serving.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):
                loop.add_signal_handler(number, stop)
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    return 0


async def _serve(backend: Backend, server: uvicorn.Server, listener: socket.socket, address: Address) -> None:
    async with backend.open():
        where = f"http://{address.bare}"
        print(f"{where}/v1 for OpenAI's clients, {where}/map/ to look", flush=True)
        await server.serve(sockets=[listener])


@contextlib.contextmanager
def _listening(wanted: Address) -> Iterator[tuple[socket.socket, Address]]:
    """A socket, and the address it got."""
    family = socket.AF_INET6 if ":" in wanted.host else socket.AF_INET
    try:
        listener = socket.create_server((wanted.host, wanted.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise BadRequest(
            f"cannot listen on {wanted.bare} ({error.strerror}): is the port taken? Give another --listen"
        ) from None
    with listener:
        yield listener, Address(wanted.host, int(listener.getsockname()[1]))
