"""A wide-area network on one machine: a namespace per host, and a hub that carries packets between all hosts."""

import asyncio
import contextlib
import itertools
import json
import re
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from treeswarm.errors import BadRequest, LinkBroken
from treeswarm_bench.lab.namespaces import (
    can_make_namespaces,
    ip_program,
    new_device,
    new_namespace,
    remove_leftovers,
)
from treeswarm_bench.lab.shape import LabLink

# Every lab has the same addresses: its namespaces see nothing else.
SUBNET, MOST_HOSTS = "10.78.0.{}", 254
HOST_NAME = re.compile(r"[a-z0-9-]{1,40}")


@dataclass(frozen=True)
class LabHost:
    """A machine of the lab."""

    name: str
    namespace: str
    address: str


@dataclass(frozen=True)
class LinkTraffic:
    """What one direction of a link carried and lost so far."""

    packets: int
    """Number of packets carried."""
    bytes: int
    """Number of bytes carried."""
    lost: int
    """Number of packets lost at random, by the link's `loss`."""
    dropped: int
    """Number of packets dropped because the queue was full."""


@dataclass(eq=False)
class Lab:
    """Hosts that reach each other through shaped links.  Make one with `wan_lab`."""

    hosts: tuple[LabHost, ...]
    _hub: asyncio.subprocess.Process
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def host(self, name: str) -> LabHost:
        """Return the host of that name.  Raises BadRequest if there is none."""
        return self.hosts[self._index(name)]

    def command(self, name: str, *program: str) -> list[str]:
        """Return a command line that runs `program` on a host."""
        return [ip_program() or "ip", "netns", "exec", self.host(name).namespace, *program]

    async def shape(self, a: str, b: str, link: LabLink, *, one_way: bool = False) -> None:
        """Give the link between two hosts another shape, both ways or only from `a` to `b`."""
        await self._order(self._pairs(a, b)[: 1 if one_way else 2], link=asdict(link))

    async def cut(self, a: str, b: str) -> None:
        """Cut the link between two hosts, both ways: packets in transit are lost as well."""
        await self._order(self._pairs(a, b), cut=True)

    async def heal(self, a: str, b: str) -> None:
        """Undo what `cut` and `cut_host` did between two hosts."""
        await self._order(self._pairs(a, b), cut=False)

    async def cut_host(self, a: str) -> None:
        """Cut the links from a host to all others."""
        await self._order(self._pairs_of(a), cut=True)

    async def heal_host(self, a: str) -> None:
        """Heal the links from a host to all others."""
        await self._order(self._pairs_of(a), cut=False)

    async def traffic(self) -> dict[tuple[str, str], LinkTraffic]:
        """Return the traffic of every direction, by the names of source and target."""
        directions = (await self._order([]))["lines"]
        return {
            (self.hosts[counters.pop("source")].name, self.hosts[counters.pop("target")].name): LinkTraffic(**counters)
            for counters in directions
        }

    def _index(self, name: str) -> int:
        for index, host in enumerate(self.hosts):
            if host.name == name:
                return index
        raise BadRequest(f"the lab has no host {name}, only {', '.join(host.name for host in self.hosts)}")

    def _pairs(self, a: str, b: str) -> list[tuple[int, int]]:
        source, target = self._index(a), self._index(b)
        if source == target:
            raise BadRequest(f"there is no link from {a} to itself")
        return [(source, target), (target, source)]

    def _pairs_of(self, a: str) -> list[tuple[int, int]]:
        return [pair for host in self.hosts if host.name != a for pair in self._pairs(a, host.name)]

    async def _order(self, pairs: Iterable[tuple[int, int]], **changes: Any) -> dict[str, Any]:
        """Give the hub an order and return its answer.  Raises LinkBroken if the hub has ended."""
        hub_in, hub_out = self._hub.stdin, self._hub.stdout
        assert hub_in is not None
        assert hub_out is not None
        async with self._turn:
            number = next(self._numbers)
            hub_in.write(json.dumps({"number": number, "pairs": list(pairs), **changes}).encode() + b"\n")
            while line := await hub_out.readline():
                answer: dict[str, Any] = json.loads(line)
                if answer["number"] == number:  # others answer orders whose callers were cancelled
                    return answer
        raise LinkBroken("the lab's hub has ended and its links carry nothing: leave the lab and make another")


@contextlib.asynccontextmanager
async def wan_lab(
    hosts: Sequence[str], link: LabLink | None = None, *, congestion: str | None = None, seed: int = 0
) -> AsyncIterator[Lab]:
    """Make hosts with `link` between any two.  On leaving, all programs still running on them are killed.

    `congestion` names the hosts' TCP congestion control (`cubic`, `reno`, `bbr`); None means the system's.  Raises
    BadRequest where namespaces cannot be made (see `can_make_namespaces`), and for bad host names.
    """
    reason = can_make_namespaces()
    if reason:
        raise BadRequest(f"cannot make a lab here: {reason}")
    if len(hosts) > MOST_HOSTS or len(set(hosts)) != len(hosts) or not all(map(HOST_NAME.fullmatch, hosts)):
        raise BadRequest(f"bad host names {', '.join(hosts)}: give up to {MOST_HOSTS} different ones of a-z, 0-9 and -")
    remove_leftovers()
    with contextlib.ExitStack() as undo:
        lab_hosts = [
            LabHost(name, undo.enter_context(new_namespace(name)), SUBNET.format(i)) for i, name in enumerate(hosts, 1)
        ]
        devices = [
            undo.enter_context(new_device(host.namespace, f"{host.address}/24", congestion=congestion))
            for host in lab_hosts
        ]
        async with _hub(lab_hosts, devices, link or LabLink(), seed) as hub:
            lab = Lab(tuple(lab_hosts), hub)
            await lab.traffic()  # its answer shows that the hub runs
            yield lab


@contextlib.asynccontextmanager
async def _hub(
    hosts: Sequence[LabHost], devices: Sequence[int], link: LabLink, seed: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    setup = {
        "devices": devices,
        "addresses": [host.address for host in hosts],
        "namespaces": [host.namespace for host in hosts],
        "link": asdict(link),
        "seed": seed,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "treeswarm_bench.lab.hub", json.dumps(setup)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=devices,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
