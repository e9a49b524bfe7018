"""A live picture of a node for its owner's terminal."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from treeswarm.programs.units import format_bytes, format_duration
from treeswarm.protocol.records import NodeState
from treeswarm.tasks import keep_running
from treeswarm_node.cli.progress_bar import LoadingProgress
from treeswarm_node.cli.qr_code import draw_qr
from treeswarm_node.cli.terminal import TerminalWriter
from treeswarm_node.monitoring.snapshot import NodeSnapshot

# People read no faster than this.
REDRAW_S = 1.0
EVENTS = 5
CODE_KEY = "c"
LEAVE = "Ctrl-C: leave the swarm"
COLOURS = {NodeState.ONLINE: "green", NodeState.JOINING: "yellow", NodeState.DRAINING: "yellow"}


@dataclass(frozen=True)
class Throughput:
    """Rates per second between two snapshots."""

    tokens: float = 0.0
    """Tokens per second."""
    rows: float = 0.0
    """Rows per second."""
    busy: float = 0.0
    """Share of the time that the device computes."""
    sent: float = 0.0
    """Bytes sent per second."""
    received: float = 0.0
    """Bytes received per second."""

    @classmethod
    def between(cls, old: NodeSnapshot, new: NodeSnapshot) -> "Throughput":
        """Return the rates between two snapshots; zeros if no time has passed."""
        seconds = new.uptime_s - old.uptime_s
        if seconds <= 0:
            return cls()
        before, now = old.compute.counters, new.compute.counters
        return cls(
            tokens=(now.tokens - before.tokens) / seconds,
            rows=(now.rows - before.rows) / seconds,
            busy=min(1.0, (now.compute_s - before.compute_s) / seconds),
            sent=(sum(new.network.sent.values()) - sum(old.network.sent.values())) / seconds,
            received=(sum(new.network.received.values()) - sum(old.network.received.values())) / seconds,
        )


def render_panel(
    snapshot: NodeSnapshot,
    throughput: Throughput,
    events: Sequence[str],
    loading: LoadingProgress | None = None,
    *,
    leaving: bool = False,
    has_code_key: bool = False,
) -> RenderableType:
    """Return what the owner sees; `leaving` after their Ctrl-C, `has_code_key` if a key shows the join code.  Pure."""
    about, sessions, kv, network = snapshot.about, snapshot.sessions, snapshot.kv, snapshot.network
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column(overflow="ellipsis", no_wrap=True)
    rows.add_row("state", _render_state(snapshot, loading))
    rows.add_row("blocks", render_blocks(snapshot))
    refused = sum(sessions.refusals.values())
    refusals = f", {refused} refused" if refused else ""
    rows.add_row("sessions", f"{sessions.open} of {sessions.limit}, {sessions.opened} since start{refusals}")
    rows.add_row(
        "speed", f"{throughput.tokens:.0f} tokens/s, {throughput.rows:.0f} rows/s, device busy {throughput.busy:.0%}"
    )
    queue_ms = 1000 * snapshot.compute.counters.queue_s
    rows.add_row("queue", f"{snapshot.compute.queue} waiting, {queue_ms:.0f} ms on average")
    if snapshot.hosting.proposes:
        rows.add_row("proposes", _render_proposals(snapshot))
    rows.add_row("KV cache", f"{kv.free_tokens} of {kv.tokens} rows free")
    rows.add_row("memory", f"{format_bytes(snapshot.compute.memory_bytes)} on {about.device}")
    sent, received = format_bytes(throughput.sent), format_bytes(throughput.received)
    rows.add_row("network", f"{sent}/s sent, {received}/s received")
    borrowers = f", {network.port_borrowers} borrow a port here" if network.port_borrowers else ""
    rows.add_row("peers", f"{network.peers} known{borrowers}")
    for i, event in enumerate(events):
        rows.add_row("" if i else "events", Text(event))
    keys = "Ctrl-C again: end at once" if leaving else LEAVE
    return _frame(snapshot, rows, f"{CODE_KEY}: join code   {keys}" if has_code_key else keys)


def render_code(snapshot: NodeSnapshot, code: str) -> RenderableType:
    """Return the join code as text and as a QR code, in place of the panel.  Pure."""
    return _frame(snapshot, Group(Text(code, no_wrap=True), draw_qr(code)), f"{CODE_KEY}: back   {LEAVE}")


def _frame(snapshot: NodeSnapshot, content: RenderableType, keys: str) -> Panel:
    title = Text(f" {snapshot.about.model} at {snapshot.about.address} ", "bold")
    return Panel(content, title=title, title_align="left", subtitle=keys, subtitle_align="right")


def _render_state(snapshot: NodeSnapshot, loading: LoadingProgress | None) -> Text:
    state = snapshot.hosting.state
    line = Text(state.value, COLOURS.get(state, "red"))
    line.append(f"  {format_duration(snapshot.uptime_s)}", "default")
    if snapshot.hosting.grace_left_s is not None and (count := snapshot.sessions.open):
        left_s = max(0.0, snapshot.hosting.grace_left_s)
        sessions = f"{count} session{'s' if count > 1 else ''}"
        return line.append(f"  {format_duration(left_s)} left for {sessions} to move to other nodes", "default")
    if loading and not loading.finished:
        return line.append(f"  {loading}", "default")
    return line.append("  swarm-node resume: serve again" if state is NodeState.PAUSED else "", "default")


def _render_proposals(snapshot: NodeSnapshot) -> str:
    counters = snapshot.compute.counters
    right = f", {counters.proposed_right / counters.proposals:.1f} tokens right per tree" if counters.proposals else ""
    return f"{counters.proposals} trees by {snapshot.hosting.proposes}{right}"


def render_blocks(snapshot: NodeSnapshot) -> Text:
    """Return the model's blocks as a line in which those that this node hosts are filled in."""
    span, blocks = snapshot.hosting.span, snapshot.about.blocks
    if span is None:
        return Text("none yet")
    width = min(blocks, 32)
    filled = [span.start <= i * blocks // width < span.end for i in range(width)]
    line = Text("".join("█" if hosted else "·" for hosted in filled), "cyan")
    return line.append(f"  {span} of {blocks}", "default")


@dataclass(eq=False)
class LivePanel:
    """A picture of the node on the owner's terminal, redrawn every second.

    Log lines are shown in it as events; a warning is also printed above the picture, and stays there.
    """

    console: Console
    loading: LoadingProgress | None = None
    """What is being loaded, or None if nothing was loaded yet."""
    leaving: bool = False
    """Whether the owner has pressed Ctrl-C."""
    code: str | None = None
    """Join code that a key shows, or None without a keyboard."""
    terminal: TerminalWriter = field(default_factory=TerminalWriter)
    _shows_code: bool = False
    _pressed: asyncio.Event = field(default_factory=asyncio.Event)
    _events: deque[str] = field(default_factory=lambda: deque(maxlen=EVENTS))
    _live: Live | None = None

    def print_above(self, line: str | Text) -> None:
        """Print a line on the terminal, above the picture."""
        text = Text(line) if isinstance(line, str) else line
        self.terminal.put(lambda: self.console.print(text, soft_wrap=True))

    def progress(self, done: int, total: int, what: str) -> None:
        """Take note of loading progress, as a `treeswarm.progress.Progress`."""
        self.loading = LoadingProgress(done, total, what)

    def add_event(self, record: logging.LogRecord, line: str) -> None:
        """Show a log record as an event; `line` is the record in full."""
        stamp = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        self._events.append(f"{stamp} {record.getMessage()}")
        if record.levelno >= logging.WARNING:
            self.print_above(line)

    @contextlib.asynccontextmanager
    async def watching(self, read: Callable[[], Awaitable[NodeSnapshot]]) -> AsyncIterator[None]:
        """Draw until left.  No picture is sent to a terminal that has not shown the one before."""
        live = self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self.terminal.put(live.start)
        drawing = asyncio.create_task(keep_running("drawing the panel", partial(self._draw, live, read)))
        try:
            yield
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
            self.terminal.put(live.stop)

    def press(self, key: str) -> None:
        """Do what a key of the owner asks for."""
        if key.lower() == CODE_KEY:
            self._shows_code = not self._shows_code
            self._pressed.set()

    def end(self, line: str) -> None:
        """Remove the picture, and leave one closing line: the process is about to end."""
        if self._live is not None:
            self.terminal.put(self._live.stop)
        self.print_above(line)
        self.terminal.close()

    async def _draw(self, live: Live, read: Callable[[], Awaitable[NodeSnapshot]]) -> None:
        old = await read()
        while True:
            new = await read()
            if self.terminal.idle:
                self.terminal.put(partial(live.update, self._picture(old, new), refresh=True))
            old = new
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pressed.wait(), REDRAW_S)
            self._pressed.clear()

    def _picture(self, old: NodeSnapshot, new: NodeSnapshot) -> RenderableType:
        if self.code and self._shows_code and not self.leaving:
            return render_code(new, self.code)
        has_key = self.code is not None and not self.leaving
        events = list(self._events)
        return render_panel(
            new, Throughput.between(old, new), events, self.loading, leaving=self.leaving, has_code_key=has_key
        )
