"""The program `swarm-node`: reads the command line, runs a node or an order of its owner."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from treeswarm.programs.interrupts import INTERRUPTED, STOPPED, TERMINATED, end_process, interrupt_ends_process, ticking

if TYPE_CHECKING:
    from treeswarm_node.config import NodeConfig

# All else is imported within functions, while Ctrl-C has no traceback.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `swarm-node` and return the exit status.

    It is 0 when a node has left the swarm, 1 after an error printed in one line, and 130 if Ctrl-C came before the node
    served: then the process ends here.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with interrupt_ends_process():
        from treeswarm.errors import SwarmError  # noqa: PLC0415
        from treeswarm.programs.process import Terminated, printable, quieten_libraries  # noqa: PLC0415

        quieten_libraries(os.environ)
    try:
        return _run(arguments)
    except SwarmError as error:
        print(f"swarm-node: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        end_process(INTERRUPTED, STOPPED)
    except Terminated:
        end_process(TERMINATED, STOPPED)


def _run(arguments: Sequence[str]) -> int:
    # Everything that a wrong command line, or a missing package, is refused for comes before torch is imported.
    with interrupt_ends_process():
        from treeswarm.errors import BadRequest  # noqa: PLC0415
        from treeswarm.programs.process import run_until_terminated  # noqa: PLC0415
        from treeswarm.programs.settings import parse  # noqa: PLC0415
        from treeswarm_node.cli.arguments import config_from_arguments, make_parser  # noqa: PLC0415
        from treeswarm_node.cli.checks import check_config, check_extras  # noqa: PLC0415
        from treeswarm_node.cli.owner_commands import COMMANDS, run_owner_command  # noqa: PLC0415

        if arguments and arguments[0] in COMMANDS:
            return run_until_terminated(run_owner_command(arguments))
        if arguments and arguments[0] == "doctor":
            return _run_doctor(arguments[1:])
        args = parse(make_parser(), "node", arguments, os.environ)
        config = config_from_arguments(args)
        if args.dry_run:
            return _run_dry(config, as_json=args.json)
        if args.json:
            raise BadRequest("--json is for --dry-run: give both, or --log-format json for a log of JSON objects")
        check_config(config)
        check_extras("swarm-node", config.model.quantization)
        with import_outside_gc(), ticking("loading torch and transformers"):
            from treeswarm_node.cli.running import run_until_stopped  # noqa: PLC0415
    return run_until_stopped(config)


def _run_dry(config: "NodeConfig", *, as_json: bool) -> int:
    """Return exit status 1 if a node with this config would not serve its model, else 0."""
    import warnings  # noqa: PLC0415

    from treeswarm_node.cli.checks import check_extras  # noqa: PLC0415
    from treeswarm_node.cli.logs import set_up_logging  # noqa: PLC0415

    check_extras("swarm-node --dry-run")
    set_up_logging(json_lines=False, verbose=False, panel=None)
    with import_outside_gc(), ticking("loading torch and transformers"):
        from treeswarm_node.cli.dry_run import dry_run  # noqa: PLC0415
    warnings.simplefilter("ignore")  # transformers' own, about configs
    return dry_run(config, as_json=as_json)


def _run_doctor(arguments: Sequence[str]) -> int:
    """Return exit status 1 if a check fails, else 0."""
    import logging  # noqa: PLC0415

    from treeswarm.programs.settings import parse  # noqa: PLC0415
    from treeswarm_node.cli.arguments import config_from_arguments, make_doctor_parser  # noqa: PLC0415
    from treeswarm_node.cli.checks import check_extras  # noqa: PLC0415
    from treeswarm_node.cli.logs import set_up_logging  # noqa: PLC0415

    args = parse(make_doctor_parser(), "node", arguments, os.environ)
    config = config_from_arguments(args)
    check_extras("swarm-node doctor")
    # The doctor imports torch; the other commands need not wait for that.
    with import_outside_gc(), ticking("loading torch"):
        from treeswarm_node.cli.doctor import doctor  # noqa: PLC0415

    set_up_logging(json_lines=False, verbose=False, panel=None)
    logging.getLogger().setLevel(logging.ERROR)  # the findings report what is wrong
    logging.getLogger("treeswarm_node").setLevel(logging.ERROR)
    return doctor(config, as_json=args.json)


@contextlib.contextmanager
def import_outside_gc() -> Iterator[None]:
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


if __name__ == "__main__":
    sys.exit(main())
