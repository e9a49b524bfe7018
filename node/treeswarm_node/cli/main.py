"""The program `swarm-node`."""

import asyncio
import contextlib
import gc
import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console

from treeswarm.errors import SwarmError
from treeswarm_node.cli.arguments import read_config
from treeswarm_node.cli.owner_commands import COMMANDS, command
from treeswarm_node.cli.panel import LivePanel
from treeswarm_node.cli.progress_bar import LoadingBar, LoadingLog
from treeswarm_node.config import NodeConfig

# Sooner than this, a second signal is the first one again: a terminal tells everybody who runs in it, and whoever
# started the node passes it on.
SAME_SIGNAL_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until Ctrl-C or SIGTERM.  Exit status 0, or 1 after an error told in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            return asyncio.run(command(arguments))
        if arguments and arguments[0] == "doctor":
            return _doctor(arguments[1:])
        return _serve(read_config(arguments))
    except SwarmError as error:
        print(f"swarm-node: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _serve(config: NodeConfig) -> int:
    panel, status = _panel(config), 1
    _set_up_logging(json_lines=config.operations.log_json, verbose=config.operations.verbose, panel=panel)
    try:
        asyncio.run(_serve_until_stopped(config, panel))
        status = 0
    finally:
        if panel and not panel.screen.close():
            os._exit(status)  # the terminal does not read, and Python would wait for it
    return status


def _doctor(arguments: Sequence[str]) -> int:
    """Exit status 1 where something fails."""
    with _kept_to_the_end():  # it looks at torch, and the others need not wait for that
        from treeswarm_node.cli.doctor import doctor  # noqa: PLC0415

    _set_up_logging(json_lines=False, verbose=False, panel=None)
    logging.getLogger().setLevel(logging.ERROR)  # what is wrong is in the findings
    logging.getLogger("treeswarm_node").setLevel(logging.ERROR)
    return doctor(arguments)


def _panel(config: NodeConfig) -> LivePanel | None:
    """On a terminal that can redraw, unless the owner or a program wants lines."""
    if config.operations.log_json or not config.operations.panel or not sys.stdout.isatty():
        return None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's name in letters that this terminal lacks
    console = Console(highlight=False)
    return None if console.is_dumb_terminal else LivePanel(console)


async def _serve_until_stopped(config: NodeConfig, panel: LivePanel | None) -> None:
    # Imported here so that --help and a wrong flag answer at once, without torch.
    with _kept_to_the_end():
        from treeswarm_node.serve import serving  # noqa: PLC0415

    stopping = _Stopping()
    bar = LoadingBar(Console(stderr=True)) if sys.stderr.isatty() and not config.operations.log_json else None
    async with contextlib.AsyncExitStack() as stack:
        if bar:
            stack.callback(bar.stop)
        with stopping.cancels():
            served = await stack.enter_async_context(serving(config, bar or LoadingLog()))
        if stopping.stop.is_set():
            return
        if bar:
            bar.stop()
        if panel:
            panel.say(str(served.ready))
            served.life.progress = panel.progress
            await stack.enter_async_context(panel.watching(served.gauge.read))
        else:
            print(json.dumps(served.ready.as_dict()) if config.operations.log_json else served.ready, flush=True)
            served.life.progress = LoadingLog()
        await served.life.live(stopping.stop)


@contextlib.contextmanager
def _kept_to_the_end() -> Iterator[None]:
    """Import within it: no collection looks at what torch and transformers make, not now, not later, not on leaving.

    They make 630 000 objects, and none of them is rubbish: looking at them was 2.4 of the 7.2 s that importing them
    and leaving took (2026-11-21, 2 cores).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _Stopping:
    """What Ctrl-C and SIGTERM do: the first lets the node take its leave, the second ends it at once."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self._told_at = 0.0
        self._cancelled: asyncio.Task[None] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):
                asyncio.get_running_loop().add_signal_handler(number, self._told)

    @contextlib.contextmanager
    def cancels(self) -> Iterator[None]:
        """Within it, being told to stop ends what is waited for; then go on after it and look at `stop`."""
        self._cancelled = asyncio.current_task()
        assert self._cancelled is not None
        try:
            yield
        except asyncio.CancelledError:
            if not self.stop.is_set() or self._cancelled.uncancel():
                raise
        finally:
            self._cancelled = None

    def _told(self) -> None:
        now = time.monotonic()
        if self.stop.is_set():
            if now - self._told_at > SAME_SIGNAL_S:
                os._exit(1)
            return
        self._told_at = now
        self.stop.set()
        if self._cancelled is not None:
            self._cancelled.cancel()


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": record.created, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _ToPanel(logging.Handler):
    def __init__(self, panel: LivePanel) -> None:
        super().__init__()
        self._panel = panel

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._panel.event(record, self.format(record))
        except Exception:  # a line that cannot be shown must not end what it tells of
            self.handleError(record)


def _set_up_logging(*, json_lines: bool, verbose: bool, panel: LivePanel | None) -> None:
    handlers: list[logging.Handler] = [_ToPanel(panel)] if panel else []
    if panel is None or not sys.stderr.isatty():
        handlers.append(logging.StreamHandler())  # beside the panel too, where stderr goes to a file
    for handler in handlers:
        handler.setFormatter(_JsonLines() if json_lines else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=handlers)
    # It logs a traceback of its own for every peer that leaves while a stream's last words are sent.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    logging.getLogger("treeswarm_node").setLevel(logging.INFO if verbose or panel else logging.WARNING)
    logging.getLogger("treeswarm_node.cli.progress_bar").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
