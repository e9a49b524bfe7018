"""`swarm bench ports`: what a borrowed port costs.

The same echoes go from a client process to a second process, directly and through a third one that lends a port to the
second.  They alternate one by one, over TLS, each way on one bidirectional stream.  In a lab (root, Linux) each process
has a host of its own.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from treeswarm.errors import NodeLost
from treeswarm.keys import Identity
from treeswarm.protocol.messages import MAX_MESSAGE_BYTES
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import StreamKind
from treeswarm.transport.tls import Security
from treeswarm_bench.benchmarks.common import spread
from treeswarm_bench.benchmarks.parts.echo import echo_s, send_back
from treeswarm_bench.lab import Lab, LabLink, wan_lab
from treeswarm_bench.raw_codec import RAW
from treeswarm_client.provenance import machine_provenance
from treeswarm_node.config import LendingConfig
from treeswarm_node.reachability.port_borrower import lease_port
from treeswarm_node.reachability.port_lender import PortLender
from treeswarm_node.sessions.server import NodeServer

SIZES = (8 << 10, 64 << 10, 1 << 20)
ECHOES = {8 << 10: 400, 64 << 10: 300, 1 << 20: 100}
LAB_ECHOES = {8 << 10: 40, 64 << 10: 40, 1 << 20: 20}
CONNECTS = 20
# The hosts' names in a lab, and the JSON keys of its addresses, are those of the first measurements.
LENDER, BORROWER, CLIENT = "landlord", "tenant", "client"

CommandOnHost = Callable[[str, list[str]], list[str]]
"""Returns the command line that runs another command line on a host, given the host's name."""


async def bench_ports(*, link: LabLink | None = None, beside: bool = False) -> dict[str, Any]:
    """Measure on loopback, or with a `link` in a lab with that link between any two of the three processes.

    With `beside`, the process that connects is on the lender's host.
    """
    if link is None:
        loopback = dict.fromkeys((LENDER, BORROWER), "127.0.0.1")
        figures = {"link": "loopback", **await _measure(lambda _, command: command, loopback, CLIENT, lab=False)}
    else:
        figures = await _measure_in_lab(link, LENDER if beside else CLIENT)
    return {"bench": "ports", **figures, "load": os.getloadavg()[0], "provenance": machine_provenance()}


async def _measure_in_lab(link: LabLink, client: str) -> dict[str, Any]:
    async with wan_lab([CLIENT, LENDER, BORROWER], link) as lab:
        hosts = {host.name: host.address for host in lab.hosts}
        return {"link": str(link), "client_at": client, **await _measure(_in(lab), hosts, client, lab=True)}


def _in(lab: Lab) -> CommandOnHost:
    return lambda host, command: lab.command(host, *command)


async def _measure(on_host: CommandOnHost, hosts: dict[str, str], client: str, *, lab: bool) -> dict[str, Any]:
    """Start the three processes, and return what the client's process measured."""
    this = [sys.executable, "-m", __name__]
    async with (
        _program(on_host(LENDER, [*this, "lend", hosts[LENDER]])) as lender,
        _program(on_host(BORROWER, [*this, "borrow", hosts[BORROWER], lender["address"]])) as borrower,
        _program(
            on_host(client, [*this, "measure", borrower["direct"], borrower["rented"], *(["lab"] if lab else [])])
        ) as measured,
    ):
        return measured


@contextlib.asynccontextmanager
async def _program(command: list[str]) -> AsyncIterator[dict[str, Any]]:
    """Run a program, and yield the one line of JSON that it prints.  Its standard input ends on leaving.

    Raises NodeLost if the program ends without a line.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        line = await process.stdout.readline()
        if not line:
            raise NodeLost("a process of the ports bench ended at once: see its error output above", "127.0.0.1")
        yield json.loads(line)
    finally:
        process.stdin.close()
        await process.wait()


# ---------------------------------------------------------------- in the three processes


async def _lend(host: str) -> None:
    """Lend ports on `host` until standard input ends."""
    identity = Identity.ephemeral()
    transport = GrpcTransport(security=Security(identity))
    node = NodeServer(transport, port_lender=PortLender(host, LendingConfig()))
    listener = await transport.listen(f"{host}:0", node.accept)
    await _print_and_wait({"address": f"{listener.address}#{identity.pin}"})
    await listener.close()


async def _borrow(host: str, lender: str) -> None:
    """Echo at a port of this process's own and at a borrowed one, until standard input ends."""
    identity = Identity.ephemeral()
    raw = GrpcTransport(security=Security(identity), codec=RAW)
    listener = await raw.listen(f"{host}:0", send_back)
    async with lease_port(GrpcTransport(security=Security(identity)), lender, listener.address) as lease:
        addresses = {"direct": listener.address, "rented": lease.address}
        await _print_and_wait({name: f"{address}#{identity.pin}" for name, address in addresses.items()})
    await listener.close()


async def _print_and_wait(line: dict[str, str]) -> None:
    print(json.dumps(line), flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def _measure_echoes(direct: str, rented: str, *, lab: bool) -> dict[str, Any]:
    """Return the milliseconds of echoes by size, and of first answers on fresh connections, both ways."""
    addresses = {"direct": direct, "rented": rented}
    transport = GrpcTransport(security=Security(), codec=RAW, send_limit=2 * MAX_MESSAGE_BYTES)
    streams = {name: await transport.connect(address, StreamKind.LINK) for name, address in addresses.items()}
    rows = []
    for size in SIZES:
        times: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range((LAB_ECHOES if lab else ECHOES)[size]):
            for name, stream in streams.items():
                times[name].append(1e3 * await echo_s(stream, bytes(size)))
        ratios = [rented_ms / direct_ms for direct_ms, rented_ms in zip(times["direct"], times["rented"], strict=True)]
        extra = [rented_ms - direct_ms for direct_ms, rented_ms in zip(times["direct"], times["rented"], strict=True)]
        figures = {name: spread(values) for name, values in times.items()}
        rows.append({"bytes": size, **figures, "ratio": spread(ratios), "extra_ms": spread(extra)})
    connects: dict[str, list[float]] = {name: [] for name in addresses}
    for _ in range(CONNECTS):
        for name, address in addresses.items():
            fresh = GrpcTransport(security=Security(), codec=RAW)
            start = time.perf_counter()
            await echo_s(await fresh.connect(address, StreamKind.CONTROL), b"x")
            connects[name].append(1e3 * (time.perf_counter() - start))
            await fresh.close()
    return {"echo_ms": rows, "first_answer_ms": {name: spread(values) for name, values in connects.items()}}


async def _main(arguments: list[str]) -> None:
    match arguments:
        case ["lend", host]:
            await _lend(host)
        case ["borrow", host, lender]:
            await _borrow(host, lender)
        case ["measure", direct, rented, *lab]:
            print(json.dumps(await _measure_echoes(direct, rented, lab=bool(lab))), flush=True)
        case _:
            raise SystemExit("this module is a part of a bench: run swarm bench ports")


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
