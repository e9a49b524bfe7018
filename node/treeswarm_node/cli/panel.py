"""A node in one live picture, for its owner's terminal."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from treeswarm.protocol.records import NodeState
from treeswarm_node.cli.progress_bar import Loading
from treeswarm_node.cli.terminal import TerminalWriter
from treeswarm_node.monitoring.snapshot import NodeSnapshot

# Eyes are no faster.
REDRAW_S = 1.0
EVENTS = 5
COLOURS = {NodeState.ONLINE: "green", NodeState.JOINING: "yellow", NodeState.DRAINING: "yellow"}
UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Throughput:
    """What happens a second, between two looks."""

    tokens: float = 0.0
    rows: float = 0.0
    busy: float = 0.0
    """Share of the time that the device computes."""
    sent: float = 0.0
    received: float = 0.0
    """Bytes."""

    @classmethod
    def between(cls, old: NodeSnapshot, new: NodeSnapshot) -> "Throughput":
        """Nothing where no time has passed."""
        seconds = new.uptime_s - old.uptime_s
        if seconds <= 0:
            return cls()
        return cls(
            tokens=(new.counters.tokens - old.counters.tokens) / seconds,
            rows=(new.counters.rows - old.counters.rows) / seconds,
            busy=min(1.0, (new.counters.compute_s - old.counters.compute_s) / seconds),
            sent=(sum(new.sent.values()) - sum(old.sent.values())) / seconds,
            received=(sum(new.received.values()) - sum(old.received.values())) / seconds,
        )


def picture(
    now: NodeSnapshot, pace: Throughput, events: Sequence[str], loading: Loading | None = None
) -> RenderableType:
    """What the owner sees.  Pure."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column(overflow="ellipsis", no_wrap=True)
    state = Text(now.state.value, COLOURS.get(now.state, "red")).append(f"  {duration(now.uptime_s)}", "default")
    hint = "  swarm-node resume: serve again" if now.state is NodeState.PAUSED else ""
    rows.add_row("state", state.append(f"  {loading}" if loading and not loading.over else hint, "default"))
    rows.add_row("blocks", blocks(now))
    refused = sum(now.refusals.values())
    saying_no = f", {refused} refused" if refused else ""
    rows.add_row("sessions", f"{now.sessions} of {now.most_sessions}, {now.opened} since start{saying_no}")
    rows.add_row("speed", f"{pace.tokens:.0f} tokens/s, {pace.rows:.0f} rows/s, device busy {pace.busy:.0%}")
    rows.add_row("queue", f"{now.queue} waiting, {1000 * now.counters.queue_s:.0f} ms lately")
    rows.add_row("KV room", f"{now.kv.free_tokens} of {now.kv.tokens} rows free")
    rows.add_row("memory", f"{size(now.memory_bytes)} on {now.device}")
    rows.add_row("line", f"{size(pace.sent)}/s out, {size(pace.received)}/s in")
    lends = f", {now.tenants} rent a port here" if now.tenants else ""
    rows.add_row("peers", f"{now.peers} known{lends}")
    for i, event in enumerate(events):
        rows.add_row("" if i else "events", Text(event))
    title = Text(f" {now.model} at {now.address} ", "bold")
    return Panel(rows, title=title, title_align="left", subtitle="Ctrl-C: leave the swarm", subtitle_align="right")


def blocks(now: NodeSnapshot) -> Text:
    """The model as a line, what this node serves filled in."""
    if now.span is None:
        return Text("none yet")
    width = min(now.blocks, 32)
    filled = [now.span.start <= i * now.blocks // width < now.span.end for i in range(width)]
    line = Text("".join("█" if mine else "·" for mine in filled), "cyan")
    return line.append(f"  {now.span} of {now.blocks}", "default")


def duration(seconds: float) -> str:
    """`47 s`, `3 min 20 s`, `5 h 12 min`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """Bytes, in thousands."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


@dataclass(eq=False)
class LivePanel:
    """While it is watched, what is logged is an event; a warning stays on the terminal above the picture, too."""

    console: Console
    loading: Loading | None = None
    """What is loaded at the moment."""
    screen: TerminalWriter = field(default_factory=TerminalWriter)
    _events: deque[str] = field(default_factory=lambda: deque(maxlen=EVENTS))

    def say(self, line: str) -> None:
        """On the terminal, above the picture."""
        self.screen.put(lambda: self.console.print(Text(line), soft_wrap=True))

    def progress(self, done: int, total: int, what: str) -> None:
        """As `treeswarm.progress.Progress`."""
        self.loading = Loading(done, total, what)

    def event(self, record: logging.LogRecord, line: str) -> None:
        """Something was logged; `line` is all of it."""
        stamp = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        self._events.append(f"{stamp} {record.getMessage()}")
        if record.levelno >= logging.WARNING:
            self.say(line)

    @contextlib.asynccontextmanager
    async def watching(self, look: Callable[[], Awaitable[NodeSnapshot]]) -> AsyncIterator[None]:
        """Draw until left.  A terminal that does not read is left out until it does."""
        live = Live(console=self.console, auto_refresh=False, transient=True)
        self.screen.put(live.start)
        drawing = asyncio.create_task(self._draw(live, look))
        try:
            yield
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
            self.screen.put(live.stop)

    async def _draw(self, live: Live, look: Callable[[], Awaitable[NodeSnapshot]]) -> None:
        old = await look()
        while True:
            new = await look()
            if self.screen.idle:
                frame = picture(new, Throughput.between(old, new), list(self._events), self.loading)
                self.screen.put(partial(live.update, frame, refresh=True))
            old = new
            await asyncio.sleep(REDRAW_S)
