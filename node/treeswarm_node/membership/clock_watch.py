"""Tells the owner when this machine's clock is wrong, and when that of another node or of a client is.

A node whose clock is off by more than the limit is refused by the others, because its records seem to have expired or
to come from the future.  Both sides log the amount and the direction.  What to log is decided by pure functions.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from treeswarm.programs.units import format_rough_duration
from treeswarm.protocol.address import host_of
from treeswarm.registry.book import BookRegistry, put_newest
from treeswarm.registry.clocks import (
    CLOCK_SKEW_S,
    ClockDifference,
    ClockSample,
    compare_clocks,
    set_clock,
    steady_s,
)
from treeswarm.registry.seam import AsksClocks

log = logging.getLogger(__name__)

# Records come once a minute.
LOOK_EVERY_S = 15.0
# A wrong clock that nobody has set is named again after this time.
REMIND_S = 3600.0


@dataclass(frozen=True)
class ClockReport:
    """What one look at the clocks found."""

    own: ClockDifference | None = None
    """How this machine's clock differs from most others', or None."""
    others: Mapping[str, float] = field(default_factory=dict)
    """Seconds by which the clock of each node or client that differs is ahead of this machine's, by its name."""


def judge_clocks(
    nodes: Sequence[ClockSample], clients: Sequence[ClockSample], asked: Sequence[ClockSample] = ()
) -> ClockReport:
    """Return whose clock is wrong: this machine's if most others agree on it, else those that differ.

    Peers of the registry that were `asked` for their time count instead of the nodes' records: they are the same nodes.
    """
    own = compare_clocks([*(asked or nodes), *clients])
    if own is not None:
        return ClockReport(own)
    named = [(f"node at {s.peer}", s) for s in nodes] + [(f"client at {s.peer}", s) for s in clients]
    off = {name: -s.difference_s for name, s in named if s.difference_s is not None}
    return ClockReport(None, {name: ahead_s for name, ahead_s in off.items() if abs(ahead_s) > CLOCK_SKEW_S})


def lines_for(report: ClockReport, before: ClockReport) -> list[str]:
    """Return the lines to log for a report that follows another one: what is new, and what has been put right."""
    lines = []
    known_s = before.own.ahead_s if before.own else 0.0
    if report.own is not None and abs(report.own.ahead_s - known_s) > CLOCK_SKEW_S:
        so = ", so that they refuse this node's records" if report.own.is_certain else ""
        lines.append(f"{report.own}{so}: {set_clock(report.own)}")
    for name, ahead_s in report.others.items():
        if abs(ahead_s - before.others.get(name, 0.0)) > CLOCK_SKEW_S:
            where = f"{format_rough_duration(abs(ahead_s))} {'ahead of' if ahead_s > 0 else 'behind'}"
            refused = ", and its records are refused" if name.startswith("node") else ""
            lines.append(f"the clock of the {name} is {where} this machine's{refused}: its owner must set it")
    if before.own is not None and report.own is None and not report.others:
        lines.append("this machine's clock agrees with the others' again")
    return lines


@dataclass(eq=False)
class ClockWatch:
    """Compares this machine's clock with those of nodes and clients while `run` runs."""

    registry: BookRegistry
    node: str
    """Id of this node."""
    clock: Callable[[], float] = time.time
    report: ClockReport = ClockReport()
    timer: Callable[[], float] = steady_s
    on_step: Callable[[], None] = lambda: None
    """Called when the clock was set by more than the limit while the node runs."""
    _asked: tuple[ClockSample, ...] = ()
    _base_s: float | None = None
    """The clock less the timer at the last look, or None before the first."""
    _clients: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The time of a client less that of the timer, and when it said so, by its host."""

    def compare_client(self, peer: str, clock: int) -> None:
        """Learn the time of the client at the address `peer`, in microseconds since 1970; 0 if it did not say."""
        if clock:
            now = self.timer()
            put_newest(self._clients, host_of(peer), (clock / 1e6 - now, now))
            self._log()

    async def run(self) -> None:
        """Look at the clocks at intervals, until cancelled."""
        reminded_at = self.timer()
        while True:
            if self.timer() > reminded_at + REMIND_S:
                self.report, reminded_at = ClockReport(), self.timer()
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Look at the clocks once."""
        if isinstance(self.registry, AsksClocks):  # The DHT hides records of wrong dates.
            self._asked = tuple(await self.registry.ask_clocks())
        self._log()

    async def is_wrong(self) -> bool:
        """Return whether this machine's clock differs from the others', after one more look."""
        await self.look()
        return self.report.own is not None

    def _notice_step(self) -> None:
        """Notice that the clock was set while the node ran: its record then has a wrong date and must be renewed."""
        base_s = self.clock() - self.timer()
        step_s = base_s - self._base_s if self._base_s is not None else 0.0
        self._base_s = base_s
        if abs(step_s) > CLOCK_SKEW_S:
            way = "forward" if step_s > 0 else "back"
            log.warning(
                "this machine's clock was set %s by %s while the node ran", way, format_rough_duration(abs(step_s))
            )
            self.on_step()

    def _log(self) -> None:
        self._notice_step()
        now = self.timer()
        self._clients = {host: said for host, said in self._clients.items() if now < said[1] + REMIND_S}
        clients = [ClockSample(host, base_s + now - self.clock()) for host, (base_s, _) in self._clients.items()]
        report = judge_clocks(self.registry.clock_samples(but=self.node), clients, self._asked)
        for line in lines_for(report, self.report):
            log.warning("%s", line)
        self.report = report
