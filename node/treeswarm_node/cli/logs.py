"""Where a node's log goes: to the owner's panel, or to standard error as text or JSON lines."""

import json
import logging
import sys

from treeswarm.programs.process import PrintableFormatter, is_own_message
from treeswarm_node.cli.panel import LivePanel


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": record.created, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class PanelHandler(logging.Handler):
    """Shows records on the owner's panel."""

    def __init__(self, panel: LivePanel) -> None:
        super().__init__()
        self._panel = panel

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._panel.add_event(record, self.format(record))
        except Exception:  # a line that cannot be shown must not end the code that logged it
            self.handleError(record)


def set_up_logging(*, json_lines: bool, verbose: bool, panel: LivePanel | None) -> None:
    """Send this program's messages to the panel or to standard error, and those of libraries nowhere.

    With `verbose`, everything is logged.
    """
    handlers: list[logging.Handler] = [PanelHandler(panel)] if panel else []
    if panel is None or not sys.stderr.isatty():
        handlers.append(logging.StreamHandler())  # beside the panel too, where stderr goes to a file
    formatter = JsonFormatter() if json_lines else PrintableFormatter("%(asctime)s %(levelname)s %(message)s")
    for handler in handlers:
        handler.setFormatter(formatter)
        if not verbose:
            handler.addFilter(is_own_message)
    logging.basicConfig(level=logging.WARNING, handlers=handlers)
    if not verbose:
        # gRPC logs a traceback of its own for every peer that leaves while the end of a stream is being sent.
        logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    logging.getLogger("treeswarm_node").setLevel(logging.INFO if verbose or panel else logging.WARNING)
    # What is being loaded, and what becomes of weights that are published in fewer bits, is said on any output.
    for name in ("cli.progress_bar", "model.checkpoint.loader"):
        logging.getLogger(f"treeswarm_node.{name}").setLevel(logging.INFO)
