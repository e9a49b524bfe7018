"""What a rented port costs.

Run `python -m treeswarm_bench.benchmarks.ports [--lab delay=25ms [--beside]]`; it prints one JSON object.

The same echoes from one process to a second, directly and through a third that lends the second its port, one by one in
turn; over TLS, on one bidirectional stream each.  In a lab (root, Linux) each process has a host of its own.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from treeswarm.keys import Identity
from treeswarm.protocol.messages import MAX_MESSAGE_BYTES
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm.transport.tls import Security
from treeswarm_bench.benchmarks.common import spread
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
START_S = 60.0
Place = Callable[[str, list[str]], list[str]]
"""The command line that runs another on a host."""


async def echo(kind: StreamKind, stream: Stream) -> None:
    while (data := await stream.receive()) is not None:
        await stream.send(data)


async def lend(host: str) -> None:
    """A landlord, until standard input ends."""
    identity = Identity.ephemeral()
    transport = GrpcTransport(security=Security(identity))
    node = NodeServer(transport, port_lender=PortLender(host, LendingConfig()))
    listener = await transport.listen(f"{host}:0", node.accept)
    await tell({"address": f"{listener.address}#{identity.pin}"})
    await listener.close()


async def live(host: str, landlord: str) -> None:
    """Echoes at its own port and at a rented one, until standard input ends."""
    identity = Identity.ephemeral()
    raw = GrpcTransport(security=Security(identity), codec=RAW)
    listener = await raw.listen(f"{host}:0", echo)
    async with lease_port(GrpcTransport(security=Security(identity)), landlord, listener.address) as port:
        addresses = {"direct": listener.address, "rented": port.address}
        await tell({name: f"{address}#{identity.pin}" for name, address in addresses.items()})
    await listener.close()


async def tell(line: dict[str, str]) -> None:
    print(json.dumps(line), flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def measure(direct: str, rented: str, *, lab: bool) -> dict[str, Any]:
    addresses = {"direct": direct, "rented": rented}
    transport = GrpcTransport(security=Security(), codec=RAW, send_limit=2 * MAX_MESSAGE_BYTES)
    streams = {name: await transport.connect(address, StreamKind.LINK) for name, address in addresses.items()}
    rows = []
    for size in SIZES:
        times: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range((LAB_ECHOES if lab else ECHOES)[size]):
            for name, stream in streams.items():
                times[name].append(1e3 * await echo_s(stream, bytes(size)))
        ratios = [rented / direct for direct, rented in zip(times["direct"], times["rented"], strict=True)]
        extra = [rented - direct for direct, rented in zip(times["direct"], times["rented"], strict=True)]
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


async def echo_s(stream: Any, data: bytes) -> float:
    start = time.perf_counter()
    await stream.send(data)
    assert len(await stream.receive()) == len(data)
    return time.perf_counter() - start


@contextlib.asynccontextmanager
async def program(command: list[str]) -> AsyncIterator[dict[str, Any]]:
    """The one line it prints; its input ends on leaving."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield json.loads(await process.stdout.readline())
    finally:
        process.stdin.close()
        await process.wait()


async def bench(place: Place, hosts: dict[str, str], client: str, *, lab: bool) -> dict[str, Any]:
    this = [sys.executable, "-m", "treeswarm_bench.benchmarks.ports"]
    async with (
        program(place("landlord", [*this, "lend", hosts["landlord"]])) as landlord,
        program(place("tenant", [*this, "live", hosts["tenant"], landlord["address"]])) as tenant,
        program(
            place(client, [*this, "measure", tenant["direct"], tenant["rented"], *(["lab"] if lab else [])])
        ) as measured,
    ):
        return measured


async def bench_in_lab(link: LabLink, client: str) -> dict[str, Any]:
    async with wan_lab(["client", "landlord", "tenant"], link) as lab:
        hosts = {host.name: host.address for host in lab.hosts}
        return {"link": str(link), "client_at": client, **await bench(_in(lab), hosts, client, lab=True)}


def _in(lab: Lab) -> Place:
    return lambda host, command: lab.command(host, *command)


async def main() -> None:
    match sys.argv[1:]:
        case ["lend", host]:
            return await lend(host)
        case ["live", host, landlord]:
            return await live(host, landlord)
        case ["measure", direct, rented, *lab]:
            return print(json.dumps(await measure(direct, rented, lab=bool(lab))), flush=True)
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--lab", metavar="LINK", help="between any two of the three: delay=25ms,rate=100mbit")
    made.add_argument("--beside", action="store_true", help="in the lab: who dials is on the landlord's host")
    args = made.parse_args()
    if args.lab:
        result = await bench_in_lab(LabLink.parse(args.lab), "landlord" if args.beside else "client")
    else:
        loopback = dict.fromkeys(("landlord", "tenant"), "127.0.0.1")
        result = {"link": "loopback", **await bench(lambda _, command: command, loopback, "client", lab=False)}
    load = os.getloadavg()[0]
    return print(json.dumps({"bench": "ports", **result, "load": load, "provenance": machine_provenance()}))


if __name__ == "__main__":
    asyncio.run(main())
