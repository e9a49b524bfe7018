"""Run command lines of the programs one after the other in one process, and report what each did."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HEAVY = ("grpc", "hivemind", "torch", "transformers")
RUNNER = """
import contextlib, io, json, sys
from importlib import import_module
commands, hidden, heavy = json.loads(sys.argv[1])
for module in hidden:
    sys.modules[module] = None
for program, *arguments in commands:
    main = import_module({"swarm": "treeswarm_client", "swarm-node": "treeswarm_node"}[program] + ".cli.main").main
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code
    loaded = [module for module in heavy if sys.modules.get(module)]
    print(json.dumps([status, output.getvalue(), errors.getvalue(), loaded]), flush=True)
"""


@dataclass(frozen=True)
class ProgramRun:
    """What one command line did."""

    command: Sequence[str]
    status: int
    output: str
    errors: str
    loaded: Sequence[str]
    """Which of `HEAVY` were loaded, by this command line or one before."""


def run_programs(commands: Sequence[Sequence[str]], home: Path, *, hidden: Sequence[str] = ()) -> list[ProgramRun]:
    """Run command lines in a process that lacks the `hidden` modules, until one of them loads something heavy."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TREESWARM_")}
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps([commands, hidden, HEAVY])],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False,
        env={**environment, "HOME": str(home), "XDG_STATE_HOME": str(home), "XDG_CACHE_HOME": str(home),
             "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    return [ProgramRun(command, *json.loads(line)) for command, line in zip(commands, lines, strict=True)]
