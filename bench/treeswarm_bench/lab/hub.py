"""The hub of a lab, a process of its own, carries IP packets between the hosts.

It reads packets from every host's TUN device and writes them, after the link's delay, to the device of the host they
are for.  Orders are lines of JSON on standard input; the hub answers each with one line.  When its input ends, the
lab's process has died; then the hub removes the lab's namespaces.
"""

import contextlib
import gc
import heapq
import itertools
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from treeswarm_bench.lab.namespaces import MTU, remove_namespace
from treeswarm_bench.lab.shape import LabLink, LinkModel

# Packets read from one device before due ones are written: few enough to delay nothing, and few system calls.
BATCH = 32
IPV4 = 4


@dataclass(eq=False)
class LinkDirection:
    """One direction of the link between two hosts."""

    source: int
    """Index of the host that sends."""
    target: int
    """Index of the host that receives."""
    device: int
    """File descriptor of the target's device."""
    model: LinkModel
    cut: bool = False
    """Whether all packets of this direction are dropped."""

    def counters(self) -> dict[str, int]:
        """Return the direction's hosts and its counts of packets and bytes."""
        model = self.model
        counts = {"packets": model.packets, "bytes": model.bytes, "lost": model.lost, "dropped": model.dropped}
        return {"source": self.source, "target": self.target, **counts}


@dataclass(eq=False)
class Hub:
    """Delays, drops and delivers the packets of all hosts.

    `devices[i]` is the file descriptor of the TUN device of the host with the IPv4 address `addresses[i]`.
    """

    devices: list[int]
    addresses: list[str]
    link: LabLink
    seed: int
    directions: dict[tuple[int, int], LinkDirection] = field(default_factory=dict)
    """Directions by the indices of source and target."""
    _routes: dict[int, dict[bytes, LinkDirection]] = field(default_factory=dict)
    """Directions by the device a packet came from and the address it goes to."""
    _in_transit: list[tuple[float, int, LinkDirection, bytes]] = field(default_factory=list)
    """Heap of packets by the time of their arrival."""
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        for source, target in itertools.permutations(range(len(self.devices)), 2):
            model = LinkModel(self.link, seed=f"{self.seed}:{source}:{target}")
            direction = self.directions[source, target] = LinkDirection(source, target, self.devices[target], model)
            route = self._routes.setdefault(self.devices[source], {})
            route[socket.inet_aton(self.addresses[target])] = direction

    def next_due(self, now: float) -> float | None:
        """Return the seconds until the next packet arrives, or None if none is in transit."""
        return max(0.0, self._in_transit[0][0] - now) if self._in_transit else None

    def take(self, device: int) -> None:
        """Read the packets waiting at a device and send them off.  IPv6 and unknown addresses are dropped."""
        route = self._routes.get(device, {})
        now = time.monotonic()
        for _ in range(BATCH):
            try:
                packet = os.read(device, MTU)
            except BlockingIOError:
                return
            direction = route.get(packet[16:20]) if packet[0] >> 4 == IPV4 else None
            if direction is None or direction.cut:
                continue
            arrival = direction.model.arrival(len(packet), now)
            if arrival is not None:
                heapq.heappush(self._in_transit, (arrival, next(self._numbers), direction, packet))

    def deliver(self) -> None:
        """Write all packets that are due.  A device that takes no more loses the packet, as a full queue would."""
        now = time.monotonic()
        while self._in_transit and self._in_transit[0][0] <= now:
            _, _, direction, packet = heapq.heappop(self._in_transit)
            if not direction.cut:
                with contextlib.suppress(OSError):
                    os.write(direction.device, packet)

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give the directions named in `pairs` another `link`, or `cut` them (false: heal).  Return all counters."""
        for source, target in order.get("pairs", []):
            direction = self.directions[source, target]
            direction.cut = order.get("cut", direction.cut)
            if "link" in order:
                direction.model.link = LabLink(**order["link"])
        counters = [direction.counters() for direction in self.directions.values()]
        return {"number": order["number"], "lines": counters}


def run(hub: Hub) -> None:
    """Forward packets and obey orders until standard input ends.

    It uses `select` rather than `epoll`, whose timeouts are whole milliseconds.
    """
    orders = sys.stdin.fileno()
    os.set_blocking(orders, False)
    unread = b""
    while True:
        ready, _, _ = select.select([orders, *hub.devices], [], [], hub.next_due(time.monotonic()))
        for device in ready:
            if device != orders:
                hub.take(device)
                continue
            data = os.read(orders, 65536)
            if not data:
                return
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                print(json.dumps(hub.obey(json.loads(line))), flush=True)
        hub.deliver()


def main(arguments: list[str]) -> None:
    """Run a hub.  The argument is JSON: its `devices`, `addresses`, `link`, `seed` and the `namespaces` by name."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the lab, which ends its hub itself
    setup = json.loads(arguments[0])
    hub = Hub(setup["devices"], setup["addresses"], LabLink(**setup["link"]), setup["seed"])
    with contextlib.suppress(OSError):
        # The hub must not wait for a core behind the programs it connects: on a busy machine it carried 320 Mbit/s
        # without this and 1100 with it.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    gc.disable()  # nothing here makes cycles, and a collection delays packets
    run(hub)
    for namespace in setup["namespaces"]:
        remove_namespace(namespace)


if __name__ == "__main__":
    main(sys.argv[1:])
