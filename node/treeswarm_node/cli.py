"""The program `swarm-node`."""

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Sequence

from treeswarm.errors import SwarmError
from treeswarm_node.command_line import read_config
from treeswarm_node.config import NodeConfig
from treeswarm_node.owner import COMMANDS, command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until Ctrl-C or SIGTERM.  Exit status 0, or 1 after an error told in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            return asyncio.run(command(arguments))
        config, verbose = read_config(arguments)
        _set_up_logging(json_lines=config.log_json, verbose=verbose)
        asyncio.run(_serve_until_stopped(config))
    except SwarmError as error:
        print(f"swarm-node: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


async def _serve_until_stopped(config: NodeConfig) -> None:
    # Imported here so that --help and a wrong flag answer at once, without torch.
    from treeswarm_node.serve import serving  # noqa: PLC0415

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    async with serving(config) as (ready, life):
        print(json.dumps(ready.as_dict()) if config.log_json else ready, flush=True)
        await life.live(stop)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": record.created, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _set_up_logging(*, json_lines: bool, verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if json_lines else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # It logs a traceback of its own for every peer that leaves while a stream's last words are sent.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    logging.getLogger("treeswarm_node").setLevel(logging.INFO if verbose else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
