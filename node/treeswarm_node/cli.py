"""The program `swarm-node`."""

import asyncio
import contextlib
import io
import json
import logging
import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from treeswarm.errors import SwarmError
from treeswarm_node.command_line import read_config
from treeswarm_node.config import NodeConfig
from treeswarm_node.loading import LoadingBar, LoadingLog
from treeswarm_node.owner import COMMANDS, command
from treeswarm_node.panel import LivePanel


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until Ctrl-C or SIGTERM.  Exit status 0, or 1 after an error told in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            return asyncio.run(command(arguments))
        if arguments and arguments[0] == "doctor":
            return _doctor(arguments[1:])
        config, verbose = read_config(arguments)
        panel = _panel(config)
        _set_up_logging(json_lines=config.log_json, verbose=verbose, panel=panel)
        asyncio.run(_serve_until_stopped(config, panel))
    except SwarmError as error:
        print(f"swarm-node: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    """Exit status 1 where something fails."""
    from treeswarm_node.doctor import doctor  # noqa: PLC0415  # it looks at torch, and the others need not wait for that

    _set_up_logging(json_lines=False, verbose=False, panel=None)
    logging.getLogger().setLevel(logging.ERROR)  # what is wrong is in the findings
    logging.getLogger("treeswarm_node").setLevel(logging.ERROR)
    return doctor(arguments)


def _panel(config: NodeConfig) -> LivePanel | None:
    """On a terminal that can redraw, unless the owner or a program wants lines."""
    if config.log_json or not config.panel or not sys.stdout.isatty():
        return None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's name in letters that this terminal lacks
    console = Console(highlight=False)
    return None if console.is_dumb_terminal else LivePanel(console)


async def _serve_until_stopped(config: NodeConfig, panel: LivePanel | None) -> None:
    # Imported here so that --help and a wrong flag answer at once, without torch.
    from treeswarm_node.serve import serving  # noqa: PLC0415

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    bar = LoadingBar(Console(stderr=True)) if sys.stderr.isatty() and not config.log_json else None
    async with contextlib.AsyncExitStack() as stack:
        if bar:
            stack.callback(bar.stop)
        served = await stack.enter_async_context(serving(config, bar or LoadingLog()))
        if bar:
            bar.stop()
        print(json.dumps(served.ready.as_dict()) if config.log_json else served.ready, flush=True)
        served.life.progress = panel.progress if panel else LoadingLog()
        if panel:
            await stack.enter_async_context(panel.watching(served.gauge.read))
        await served.life.live(stop)


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
        self._panel.event(record, self.format(record))


def _set_up_logging(*, json_lines: bool, verbose: bool, panel: LivePanel | None) -> None:
    handler = _ToPanel(panel) if panel else logging.StreamHandler()
    handler.setFormatter(_JsonLines() if json_lines else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # It logs a traceback of its own for every peer that leaves while a stream's last words are sent.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    logging.getLogger("treeswarm_node").setLevel(logging.INFO if verbose or panel else logging.WARNING)
    logging.getLogger("treeswarm_node.loading").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
