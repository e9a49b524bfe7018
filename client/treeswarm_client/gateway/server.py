"""Runs the gateway: connects to the swarm, serves HTTP, and ends both on a signal."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from treeswarm.errors import BadRequest
from treeswarm.protocol.address import Address
from treeswarm_client.gateway.app import make_app
from treeswarm_client.gateway.backend import Backend

# Seconds that answers under way have to end after a signal.
GRACE_S = 3.0
# Seconds after that in which they can still send why they ended.
LAST_EVENTS_S = 7
BACKLOG = 1024


class _Server(uvicorn.Server):
    """A server that leaves signals alone: uvicorn raises them again at its end, and SIGTERM would look like a crash."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


WhileOpening = Callable[[], contextlib.AbstractContextManager[object]]


async def run_gateway(
    backend: Backend, *, log_requests: bool = False, while_opening: WhileOpening = contextlib.nullcontext
) -> int:
    """Serve until SIGINT or SIGTERM, and print the address as soon as it listens.  Raises BadRequest and ModelError.

    `while_opening` returns a context that lasts as long as the client is being opened, to show that on a terminal.
    """
    with _listening(backend.config.listen) as (listener, address):
        settings = uvicorn.Config(
            make_app(backend, log_requests=log_requests),
            lifespan="off",
            log_level="info" if log_requests else "warning",
            access_log=False,
            timeout_graceful_shutdown=int(GRACE_S) + LAST_EVENTS_S,
            server_header=False,
        )
        server = _Server(settings)

        async with contextlib.AsyncExitStack() as stack:
            with while_opening():
                await stack.enter_async_context(backend.open())
            url = f"http://{address.bare}"
            _stop_on_signals(backend, server)
            print(f"serving {url}/v1 for OpenAI clients and {url}/ for browsers", flush=True)
            await server.serve(sockets=[listener])
    return 0


def _stop_on_signals(backend: Backend, server: uvicorn.Server) -> None:
    """End gracefully on the first signal, and at once on the second.

    A signal that comes before, while the client is opened, ends the program as it ends every command.
    """

    def stop() -> None:
        if server.should_exit:
            server.force_exit = True
            return
        server.should_exit = True
        backend.stop(GRACE_S)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop)


@contextlib.contextmanager
def _listening(address: Address) -> Iterator[tuple[socket.socket, Address]]:
    """Listen, and yield the socket and its actual address.  Raises BadRequest."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise BadRequest(
            f"cannot listen on {address.bare} ({error.strerror}): give another address with --listen"
        ) from None
    with listener:
        yield listener, Address(address.host, int(listener.getsockname()[1]))
