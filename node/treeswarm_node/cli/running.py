"""Run one node, with its panel or its log, until Ctrl-C or SIGTERM, and let it leave the swarm."""

import asyncio
import contextlib
import io
import json
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console

from treeswarm.programs.interrupts import INTERRUPTED, STOPPED, end_process
from treeswarm_node.cli.logs import set_up_logging
from treeswarm_node.cli.panel import LivePanel
from treeswarm_node.cli.progress_bar import LoadingBar, LoadingLog
from treeswarm_node.cli.qr_code import can_draw_qr, draw_qr
from treeswarm_node.cli.terminal import Keyboard
from treeswarm_node.config import NodeConfig
from treeswarm_node.serve import RunningNode, run_node

log = logging.getLogger(__name__)

# A second signal that comes sooner than this is the first one again: a terminal sends it to every process that runs in
# it, and the program that started the node passes it on.
SAME_SIGNAL_S = 1.0
LEFT = "swarm-node: left the swarm"
CUT = "swarm-node: ended at once; sessions that were here move to other nodes, if there are any"


def run_until_stopped(config: NodeConfig) -> int:
    """Run a node until it is told to stop, and return the exit status.

    A node that was still loading is not waited for: then the process ends here.
    """
    panel, status = _make_panel(config), 1
    set_up_logging(json_lines=config.operations.log_json, verbose=config.operations.verbose, panel=panel)
    runner = asyncio.Runner()
    try:
        stopped_early = runner.run(_serve_until_stopped(config, panel))
        if stopped_early is not None:  # threads may be loading the model: nothing waits for them
            end_process(INTERRUPTED if stopped_early == signal.SIGINT else 0, STOPPED)
        status = 0
    finally:
        runner.close()
        if panel and not panel.terminal.close():
            end_process(status)  # the terminal does not read, and Python would wait for it
    return status


def _make_panel(config: NodeConfig) -> LivePanel | None:
    """Return a panel on a terminal that can redraw, unless the owner or a program asked for lines."""
    if config.operations.log_json or not config.operations.panel or not sys.stdout.isatty():
        return None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's name may have letters that this terminal lacks
    console = Console(highlight=False)
    return None if console.is_dumb_terminal else LivePanel(console)


async def _serve_until_stopped(config: NodeConfig, panel: LivePanel | None) -> int | None:
    """Return the signal that came before the node served, or None once the node has served and left."""
    signals, log_json = _StopSignals(), config.operations.log_json
    bar = LoadingBar(Console(stderr=True)) if sys.stderr.isatty() and not log_json else None
    async with contextlib.AsyncExitStack() as stack:
        if bar:
            bar.start("finding the swarm")
            stack.callback(bar.stop)
            signals.before_end = bar.stop
        with signals.cancel_waiting():
            node = await stack.enter_async_context(run_node(config, bar or LoadingLog()))
        if signals.received is not None:
            return signals.received
        if bar:
            bar.stop()
        if panel:
            await stack.enter_async_context(_shown(node, panel, signals, qr=config.operations.qr))
        else:
            print(json.dumps(node.ready.as_dict()) if log_json else node.ready, flush=True)
            if config.operations.qr and not log_json:
                Console().print(draw_qr(node.ready.code))
            node.lifecycle.progress = LoadingLog()
        await node.lifecycle.run(signals.stop)
        _say_what_is_waited_for(node, config, panel)
        await node.lifecycle.leave()
    if panel:
        panel.print_above(LEFT)
    return None


@contextlib.asynccontextmanager
async def _shown(node: RunningNode, panel: LivePanel, signals: "_StopSignals", *, qr: bool) -> AsyncIterator[None]:
    """Show the ready lines and the panel, whose keys are read."""
    panel.print_above(str(node.ready))
    if qr:
        panel.print_above(draw_qr(node.ready.code))
    node.lifecycle.progress = panel.progress
    keyboard = Keyboard(panel.press)
    if can_draw_qr() and keyboard.open():
        panel.code = node.ready.code

    def clear() -> None:
        keyboard.close()
        panel.end(CUT)

    signals.before_end = clear
    try:
        async with panel.watching(node.collector.read):
            yield
    finally:
        keyboard.close()


def _say_what_is_waited_for(node: RunningNode, config: NodeConfig, panel: LivePanel | None) -> None:
    sessions = len(node.lifecycle.node.sessions)
    if panel:
        panel.leaving = True
    elif sessions:
        grace_s = config.limits.drain_grace_s
        log.warning("leaving: %d sessions have %.0f s to move to other nodes; Ctrl-C ends at once", sessions, grace_s)


@dataclass(eq=False)
class _StopSignals:
    """Handles Ctrl-C and SIGTERM: the first signal lets the node leave the swarm, the second ends it at once."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    received: int | None = None
    """Number of the first signal, or None."""
    before_end: Callable[[], None] = lambda: None
    """Clears the terminal before the second signal ends the process."""
    _received_at: float = 0.0
    _waiting: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    @contextlib.contextmanager
    def cancel_waiting(self) -> Iterator[None]:
        """Let a stop signal cancel what is awaited within this context; then continue after it and look at `stop`."""
        self._waiting = asyncio.current_task()
        assert self._waiting is not None
        try:
            yield
        except asyncio.CancelledError:
            if not self.stop.is_set() or self._waiting.uncancel():
                raise
        finally:
            self._waiting = None

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self.received is not None:
            if now - self._received_at > SAME_SIGNAL_S:
                self.before_end()
                end_process(INTERRUPTED)
            return
        self._received_at, self.received = now, number
        self.stop.set()
        if self._waiting is not None:
            self._waiting.cancel()
