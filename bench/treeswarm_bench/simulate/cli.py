"""`swarm simulate`: thousands of nodes in virtual time."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from treeswarm_bench.simulate.config import SimulationSettings
from treeswarm_bench.simulate.engine import simulate
from treeswarm_bench.simulate.plot import require_matplotlib, write_plot
from treeswarm_client.cli.flags import show_progress

EXAMPLES = """examples:
  swarm simulate                                       1,000 nodes for an hour; takes half a minute
  swarm simulate --churn 0.2 --plot swarm.png          a fifth of the nodes replaced per hour
  swarm simulate --nodes 200 --flash-crowd 400         400 nodes join within a minute
  swarm simulate --nodes 200 --holes 2                 twice, all holders of a block vanish at once
  swarm simulate --nodes 10000 --churn 0.2 --json      takes minutes

Placement, routing, bans and coordinates are the code that nodes and clients run; speeds, memory, regions, registry
delay and habits are invented (bench/treeswarm_bench/simulate/config.py says which and why)."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm simulate` to the command line."""
    defaults = SimulationSettings()
    parser = commands.add_parser(
        "simulate",
        help="see how a swarm of thousands of nodes places blocks and routes",
        description="Simulate a swarm on one core: which nodes host which blocks, how clients route, what fails and "
        "how fast it is repaired.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=defaults.nodes, help="nodes online at the start (default 1000)")
    parser.add_argument("--blocks", type=int, default=defaults.blocks, help="blocks of the model (default 80)")
    parser.add_argument("--hours", type=float, default=defaults.hours, help="virtual hours to simulate (default 1)")
    parser.add_argument(
        "--churn", type=float, default=defaults.churn, help="share of nodes replaced per hour (default 0)"
    )
    parser.add_argument(
        "--flash-crowd",
        type=int,
        default=0,
        metavar="N",
        help="N nodes join within one minute, a quarter of the time into the simulation",
    )
    parser.add_argument(
        "--holes", type=int, default=0, metavar="N", help="N times, all holders of a random block vanish at once"
    )
    parser.add_argument(
        "--no-probes",
        action="store_false",
        dest="probes",
        help="nodes do not probe others: a lost node counts until its record expires",
    )
    parser.add_argument(
        "--clients", type=int, default=defaults.clients, help="clients that generate text after text (default 100)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="same seed, same swarm (default 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a plot (needs the extra `plot`)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    names = ("nodes", "blocks", "hours", "churn", "flash_crowd", "holes", "probes", "clients", "seed")
    settings = SimulationSettings(**{name: getattr(args, name) for name in names})
    if args.plot:
        require_matplotlib()
    with show_progress("starting") as show:
        report = simulate(settings, lambda hours: show(f"{hours:.2f} of {settings.hours:g} simulated hours"))
    if args.plot:
        write_plot(report, args.plot)
    if args.json:
        print(json.dumps(report.as_json()))
    else:
        Console().print(report.as_table())
    return 0
