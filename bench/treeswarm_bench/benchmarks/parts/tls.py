"""`swarm bench tls`: what TLS costs, by echoes between two processes on loopback, plain and protected in turn."""

import time
from typing import Any

from rich.table import Table

from treeswarm.transport.seam import StreamKind
from treeswarm_bench.benchmarks.common import spread
from treeswarm_bench.benchmarks.parts.echo import FORMS, echo_process, echo_s, transport_of
from treeswarm_client.provenance import machine_provenance

SIZES = (8 << 10, 64 << 10, 1 << 20)
ECHOES = {8 << 10: 400, 64 << 10: 300, 1 << 20: 100}
CONNECTS = 30


async def bench_tls() -> dict[str, Any]:
    """Measure round trips of one message up and the same one down, and the time until a first small one is back."""
    async with echo_process() as addresses:
        transports = {name: transport_of(name) for name in addresses}
        streams = {name: await transports[name].connect(addresses[name], StreamKind.LINK) for name in addresses}
        rows = [await _echo_row(size, streams) for size in SIZES]
        for transport in transports.values():
            await transport.close()
        connects = await _connects(addresses)
    return {"bench": "tls", "echo_ms": rows, "connect_ms": connects, "provenance": machine_provenance()}


def table_of(result: dict[str, Any]) -> Table:
    """Return the medians as a table for a terminal."""
    table = Table(title="loopback, two processes: median ms", title_justify="left")
    for column in ("", "plain", "TLS", "TLS and swarm key", "TLS / plain"):
        table.add_column(column, justify="right" if column else "left")
    for row in result["echo_ms"]:
        medians = [f"{row[name]['median']:.2f}" for name in FORMS]
        table.add_row(f"echo of {row['bytes'] >> 10} KiB", *medians, f"{row['ratio_tls_to_plain']['median']:.2f}")
    for which in ("first", "next"):
        plain, tls, private = (result["connect_ms"][f"{name}, {which}"]["median"] for name in FORMS)
        table.add_row(f"{which} connection", f"{plain:.2f}", f"{tls:.2f}", f"{private:.2f}", f"{tls / plain:.2f}")
    return table


async def _echo_row(size: int, streams: dict[str, Any]) -> dict[str, Any]:
    data = bytes(size)
    times: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(ECHOES[size]):
        for name, stream in streams.items():
            times[name].append(1e3 * await echo_s(stream, data))
    figures = {name: spread(values) for name, values in times.items()}
    ratios = spread([tls / plain for plain, tls in zip(times["plain"], times["tls"], strict=True)])
    return {"bytes": size, **figures, "ratio_tls_to_plain": ratios}


async def _connects(addresses: dict[str, str]) -> dict[str, Any]:
    """Measure connections: `first` fetches the certificate; `next` has it and opens one more connection."""
    times: dict[str, list[float]] = {}
    for _ in range(CONNECTS):
        for name, address in addresses.items():
            transport = transport_of(name)
            for which, kind in (("first", StreamKind.CONTROL), ("next", StreamKind.LINK)):
                start = time.perf_counter()
                stream = await transport.connect(address, kind)
                await echo_s(stream, b"x")
                times.setdefault(f"{name}, {which}", []).append(1e3 * (time.perf_counter() - start))
            await transport.close()
    return {name: spread(values) for name, values in times.items()}
