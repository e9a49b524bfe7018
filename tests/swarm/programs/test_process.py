"""What libraries write does not reach a user's terminal, unless they ask, and what others say controls none."""

import logging
import os
import subprocess
import sys

import pytest

from treeswarm.programs.process import QUIET, PrintableFormatter, printable, quieten_libraries

# gRPC's core writes to standard error itself: here because a port is taken.
PROGRAM = """
import os
from importlib import import_module
main = import_module(os.environ["PROGRAM"])
from treeswarm.errors import BadRequest
from treeswarm.programs.process import quieten_libraries

quieten_libraries(os.environ)
if "client" in os.environ["PROGRAM"]:
    main._set_up_logging()
else:
    from treeswarm_node.cli.logs import set_up_logging
    set_up_logging(json_lines=False, verbose="TREESWARM_VERBOSE" in os.environ, panel=None)
import logging, socket, warnings
import grpc
from concurrent.futures import ThreadPoolExecutor

warnings.warn("from Python")
logging.getLogger("hivemind.p2p").error("from hivemind")
logging.getLogger("asyncio").error("from asyncio")
with socket.create_server(("127.0.0.1", 0)) as taken:
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    try:
        server.add_insecure_port(f"127.0.0.1:{taken.getsockname()[1]}")
    except RuntimeError:
        pass
logging.getLogger("treeswarm_client.chain").warning("from this project")
"""


@pytest.mark.parametrize("program", ["treeswarm_client.cli.main", "treeswarm_node.cli.main"])
@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_are_silent_unless_the_user_asks(program: str, verbose: bool) -> None:
    unset = {name: value for name, value in os.environ.items() if name not in QUIET and name != "PYTHONWARNINGS"}
    environment = {**unset, "PROGRAM": program, **({"TREESWARM_VERBOSE": "1"} if verbose else {})}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == ""
    if not verbose:
        (line,) = result.stderr.splitlines()
        assert line.endswith("from this project")
    else:
        for words in ("from Python", "from hivemind", "from asyncio", "Address already in use", "from this project"):
            assert words in result.stderr


def test_variables_of_the_user_stay_as_they_are() -> None:
    environment = {"GRPC_VERBOSITY": "debug"}
    quieten_libraries(environment)
    assert environment == {**QUIET, "GRPC_VERBOSITY": "debug"}
    asked = {"TREESWARM_VERBOSE": "1"}
    quieten_libraries(asked)
    assert list(asked) == ["TREESWARM_VERBOSE"]


def test_messages_that_quote_others_control_no_terminal() -> None:
    evil = "1 of another model (\x1b]0;title\x07\x1b[2Jdemo\u202e\r)"
    assert printable(evil) == "1 of another model (�]0;title��[2Jdemo��)"
    assert printable("Größe 模型 → ok\n\tnext") == "Größe 模型 → ok\n\tnext"


def test_log_lines_that_quote_others_control_no_terminal() -> None:
    record = logging.LogRecord("treeswarm", logging.WARNING, __file__, 1, "silent: %s", ("\x1b[31mhost:1",), None)
    assert PrintableFormatter("%(levelname)s %(message)s").format(record) == "WARNING silent: �[31mhost:1"
