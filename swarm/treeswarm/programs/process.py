"""What both programs do with their process: keep libraries quiet, and end at once when the user says so."""

import asyncio
import contextlib
import logging
import signal
import sys
import warnings
from collections.abc import Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

T = TypeVar("T")

# Set by the user, it lets everything through that libraries say; `swarm-node --verbose` does the same.
VERBOSE_VARIABLE = "TREESWARM_VERBOSE"
OFF = ("", "0", "false", "no", "off")
# How libraries are told to be quiet: they read this when they are imported.  What they report of peers, of streams and
# of their own options is told in the program's own words where it matters.
QUIET = {
    "GRPC_VERBOSITY": "NONE",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # else it warns after every fork
}


# White space of messages, and of the languages in which owners name things, that does no harm.
SPACES = "\n\t\u00a0\u202f\u3000"


class Terminated(BaseException):
    """SIGTERM came, and what was started has been ended.

    It is no Exception, so that no handler of errors goes on after it.
    """


def quieten_libraries(environ: MutableMapping[str, str]) -> None:
    """Keep what libraries write off the user's terminal.  Variables that the user has set stay as they are."""
    if is_verbose(environ):
        return
    for name, value in QUIET.items():
        environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def is_verbose(environ: Mapping[str, str]) -> bool:
    """Return whether the user wants to see what libraries say."""
    return environ.get(VERBOSE_VARIABLE, "").lower() not in OFF


def is_own_message(record: logging.LogRecord) -> bool:
    """Return whether this project wrote a log record.  It is a filter for the handlers that a user sees."""
    return record.name.startswith("treeswarm") or record.name == "__main__"


def printable(text: str) -> str:
    """Return a message without the characters that control a terminal: it may quote what other owners wrote."""
    return "".join(letter if letter.isprintable() or letter in SPACES else "\ufffd" for letter in text)


class PrintableFormatter(logging.Formatter):
    """Formats a log record for a terminal; see `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def run_until_terminated(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` as `asyncio.run` does, but treat SIGTERM like Ctrl-C: cancel `work`, which then ends what it started.

    Raises Terminated after SIGTERM, and KeyboardInterrupt after Ctrl-C.  Threads are not waited for then: the caller
    ends the process.
    """
    runner = asyncio.Runner()
    try:
        result = runner.run(_run_with_handler(work))
    except (KeyboardInterrupt, Terminated):
        raise
    except BaseException:
        runner.close()
        raise
    runner.close()
    return result


async def _run_with_handler(work: Coroutine[Any, Any, T]) -> T:
    loop, this_task = asyncio.get_running_loop(), asyncio.current_task()
    assert this_task is not None
    terminated = asyncio.Event()

    def terminate() -> None:
        """Cancel once only: `timeout` signals a program and then its whole group, and cleaning up must go on."""
        if not terminated.is_set():
            terminated.set()
            this_task.cancel()

    with contextlib.suppress(NotImplementedError):  # Windows has no SIGTERM
        loop.add_signal_handler(signal.SIGTERM, terminate)
    try:
        return await work
    except asyncio.CancelledError:
        if terminated.is_set() and not this_task.uncancel():
            raise Terminated from None
        raise
    finally:
        with contextlib.suppress(NotImplementedError):
            loop.remove_signal_handler(signal.SIGTERM)
