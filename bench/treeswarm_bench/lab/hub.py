"""The wire of a lab, a process of its own: reads IP packets from every host's TUN device and writes them, later, to
the device of the host they are for.

It is told what to do by lines of JSON on standard input and answers each with one.  When its input ends, the lab's
process has died; then it removes the lab's namespaces.
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

# Packets read from one device before due ones are written: short enough to hold nothing up, and few system calls.
BATCH = 32
IPV4 = 4


@dataclass(eq=False)
class HubPort:
    """One direction between two hosts."""

    source: int
    target: int
    device: int
    """The target's file descriptor."""
    model: LinkModel
    cut: bool = False

    def counters(self) -> dict[str, int]:
        model = self.model
        counts = {"packets": model.packets, "bytes": model.bytes, "lost": model.lost, "dropped": model.dropped}
        return {"source": self.source, "target": self.target, **counts}


@dataclass(eq=False)
class Hub:
    """`devices[i]` is the descriptor of the host with the IPv4 address `addresses[i]`."""

    devices: list[int]
    addresses: list[str]
    link: LabLink
    seed: int
    lines: dict[tuple[int, int], HubPort] = field(default_factory=dict)
    _routes: dict[int, dict[bytes, HubPort]] = field(default_factory=dict)
    """By the device a packet came from and the address it goes to."""
    _under_way: list[tuple[float, int, HubPort, bytes]] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        for source, target in itertools.permutations(range(len(self.devices)), 2):
            model = LinkModel(self.link, seed=f"{self.seed}:{source}:{target}")
            line = self.lines[source, target] = HubPort(source, target, self.devices[target], model)
            route = self._routes.setdefault(self.devices[source], {})
            route[socket.inet_aton(self.addresses[target])] = line

    def next_due(self, now: float) -> float | None:
        """Seconds until a packet arrives; None if none is under way."""
        return max(0.0, self._under_way[0][0] - now) if self._under_way else None

    def take(self, device: int) -> None:
        """Send off what waits at a device; what is for nobody here, and all IPv6, goes nowhere."""
        route = self._routes.get(device, {})
        now = time.monotonic()
        for _ in range(BATCH):
            try:
                packet = os.read(device, MTU)
            except BlockingIOError:
                return
            line = route.get(packet[16:20]) if packet[0] >> 4 == IPV4 else None
            if line is None or line.cut:
                continue
            arrival = line.model.arrival(len(packet), now)
            if arrival is not None:
                heapq.heappush(self._under_way, (arrival, next(self._numbers), line, packet))

    def deliver(self) -> None:
        """Write what is due.  A device that takes no more loses the packet, as a full queue would."""
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, line, packet = heapq.heappop(self._under_way)
            if not line.cut:
                with contextlib.suppress(OSError):
                    os.write(line.device, packet)

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give the lines named in `pairs` another `link`, or `cut` them (false: heal).  Answers the counters."""
        for source, target in order.get("pairs", []):
            line = self.lines[source, target]
            line.cut = order.get("cut", line.cut)
            if "link" in order:
                line.model.link = LabLink(**order["link"])
        return {"number": order["number"], "lines": [line.counters() for line in self.lines.values()]}


def run(hub: Hub) -> None:
    """Forward and obey until standard input ends.

    `select` rather than `epoll`, whose timeouts are whole milliseconds.
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
            read = os.read(orders, 65536)
            if not read:
                return
            *lines, unread = (unread + read).split(b"\n")
            for line in lines:
                print(json.dumps(hub.obey(json.loads(line))), flush=True)
        hub.deliver()


def main(arguments: list[str]) -> None:
    """The one argument is JSON: Hub's `devices`, `addresses`, `link` and `seed`, and the `namespaces` by name."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the lab, which ends its hub itself
    told = json.loads(arguments[0])
    hub = Hub(told["devices"], told["addresses"], LabLink(**told["link"]), told["seed"])
    with contextlib.suppress(OSError):
        # The wire must not wait for a core behind the programs it connects: on a busy machine it carried 320 Mbit/s
        # without this and 1100 with it.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    gc.disable()  # nothing here makes cycles, and a collection holds packets up
    run(hub)
    for namespace in told["namespaces"]:
        remove_namespace(namespace)


if __name__ == "__main__":
    main(sys.argv[1:])
