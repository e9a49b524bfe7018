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
from treeswarm_node.cli.owner_commands import COMMANDS, run_owner_command
from treeswarm_node.cli.panel import LivePanel
from treeswarm_node.cli.progress_bar import LoadingBar, LoadingLog
from treeswarm_node.cli.qr_code import check_qr, draw_qr
from treeswarm_node.config import NodeConfig
from treeswarm_node.joining import check_code

# A second signal that comes sooner than this is the first one again: a terminal sends it to every process that runs in
# it, and the program that started the node passes it on.
SAME_SIGNAL_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `swarm-node` until Ctrl-C or SIGTERM; return exit status 0, or 1 after an error printed in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            return asyncio.run(run_owner_command(arguments))
        if arguments and arguments[0] == "doctor":
            return _run_doctor(arguments[1:])
        config = read_config(arguments)
        check_code(config.network)
        if config.operations.qr:
            check_qr()
        return _run_node(config)
    except SwarmError as error:
        print(f"swarm-node: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _run_node(config: NodeConfig) -> int:
    panel, status = _make_panel(config), 1
    _set_up_logging(json_lines=config.operations.log_json, verbose=config.operations.verbose, panel=panel)
    try:
        asyncio.run(_serve_until_stopped(config, panel))
        status = 0
    finally:
        if panel and not panel.terminal.close():
            os._exit(status)  # the terminal does not read, and Python would wait for it
    return status


def _run_doctor(arguments: Sequence[str]) -> int:
    """Return exit status 1 if a check fails, else 0."""
    with _import_outside_gc():  # the doctor imports torch; the other commands need not wait for that
        from treeswarm_node.cli.doctor import doctor  # noqa: PLC0415

    _set_up_logging(json_lines=False, verbose=False, panel=None)
    logging.getLogger().setLevel(logging.ERROR)  # the findings report what is wrong
    logging.getLogger("treeswarm_node").setLevel(logging.ERROR)
    return doctor(arguments)


def _make_panel(config: NodeConfig) -> LivePanel | None:
    """Return a panel on a terminal that can redraw, unless the owner or a program asked for lines."""
    if config.operations.log_json or not config.operations.panel or not sys.stdout.isatty():
        return None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's name may have letters that this terminal lacks
    console = Console(highlight=False)
    return None if console.is_dumb_terminal else LivePanel(console)


async def _serve_until_stopped(config: NodeConfig, panel: LivePanel | None) -> None:
    # Imported here so that --help and a wrong flag answer at once, without torch.
    with _import_outside_gc():
        from treeswarm_node.serve import run_node  # noqa: PLC0415

    log_json = config.operations.log_json
    signals = _StopSignals()
    bar = LoadingBar(Console(stderr=True)) if sys.stderr.isatty() and not log_json else None
    async with contextlib.AsyncExitStack() as stack:
        if bar:
            stack.callback(bar.stop)
        with signals.cancel_waiting():
            node = await stack.enter_async_context(run_node(config, bar or LoadingLog()))
        if signals.stop.is_set():
            return
        if bar:
            bar.stop()
        if panel:
            panel.print_above(str(node.ready))
            if config.operations.qr:
                panel.print_above(draw_qr(node.ready.code))
            node.lifecycle.progress = panel.progress
            await stack.enter_async_context(panel.watching(node.collector.read))
        else:
            print(json.dumps(node.ready.as_dict()) if log_json else node.ready, flush=True)
            if config.operations.qr and not log_json:
                Console().print(draw_qr(node.ready.code))
            node.lifecycle.progress = LoadingLog()
        await node.lifecycle.run(signals.stop)


@contextlib.contextmanager
def _import_outside_gc() -> Iterator[None]:
    """Keep what is imported within this context out of garbage collection, now, later and at exit.

    torch and transformers create 630 000 objects, and none of them is garbage: looking at them took 2.4 of the 7.2 s
    that importing them and exiting took (2026-11-21, 2 cores).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _StopSignals:
    """Handles Ctrl-C and SIGTERM: the first signal lets the node leave the swarm, the second ends it at once."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self._received_at = 0.0
        self._waiting: asyncio.Task[None] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

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

    def _on_signal(self) -> None:
        now = time.monotonic()
        if self.stop.is_set():
            if now - self._received_at > SAME_SIGNAL_S:
                os._exit(1)
            return
        self._received_at = now
        self.stop.set()
        if self._waiting is not None:
            self._waiting.cancel()


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": record.created, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _PanelHandler(logging.Handler):
    def __init__(self, panel: LivePanel) -> None:
        super().__init__()
        self._panel = panel

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._panel.add_event(record, self.format(record))
        except Exception:  # a line that cannot be shown must not end the code that logged it
            self.handleError(record)


def _set_up_logging(*, json_lines: bool, verbose: bool, panel: LivePanel | None) -> None:
    handlers: list[logging.Handler] = [_PanelHandler(panel)] if panel else []
    if panel is None or not sys.stderr.isatty():
        handlers.append(logging.StreamHandler())  # beside the panel too, where stderr goes to a file
    formatter = _JsonFormatter() if json_lines else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=handlers)
    # gRPC logs a traceback of its own for every peer that leaves while the end of a stream is being sent.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    logging.getLogger("treeswarm_node").setLevel(logging.INFO if verbose or panel else logging.WARNING)
    logging.getLogger("treeswarm_node.cli.progress_bar").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
