"""`swarm simulate`: thousands of nodes in virtual time."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from treeswarm_bench.simulate.config import Settings
from treeswarm_bench.simulate.engine import simulate
from treeswarm_bench.simulate.plot import require_matplotlib, write_plot
from treeswarm_client.cli.flags import show_progress

EXAMPLES = """examples:
  swarm simulate                                       1,000 nodes for an hour; half a minute
  swarm simulate --churn 0.2 --plot swarm.png          a fifth of them replaced every hour
  swarm simulate --nodes 200 --flash-crowd 400         400 nodes join within a minute
  swarm simulate --nodes 10000 --churn 0.2 --json      minutes

Placement, routing, bans and coordinates are the code that nodes and clients run; speeds, memory, regions, registry
delay and habits are invented (bench/treeswarm_bench/simulate/config.py says which and why)."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    defaults = Settings()
    made = commands.add_parser(
        "simulate",
        help="see how a swarm of thousands of nodes places blocks and routes",
        description="Simulate a swarm on one core: who hosts what, who routes where, what breaks and heals.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--nodes", type=int, default=defaults.nodes, help="online at the start (default 1000)")
    made.add_argument("--blocks", type=int, default=defaults.blocks, help="of the model (default 80)")
    made.add_argument("--hours", type=float, default=defaults.hours, help="virtual hours (default 1)")
    made.add_argument("--churn", type=float, default=defaults.churn, help="share of nodes replaced an hour (default 0)")
    made.add_argument(
        "--flash-crowd", type=int, default=0, metavar="N", help="N nodes join within a minute, after a quarter of it"
    )
    made.add_argument("--clients", type=int, default=defaults.clients, help="asking in turn (default 100)")
    made.add_argument("--seed", type=int, default=defaults.seed, help="same seed, same swarm (default 0)")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs the extra `plot`)")
    made.add_argument("--json", action="store_true", help="one JSON object")
    made.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    names = ("nodes", "blocks", "hours", "churn", "flash_crowd", "clients", "seed")
    settings = Settings(**{name: getattr(args, name) for name in names})
    if args.plot:
        require_matplotlib()
    with show_progress("beginning") as say:
        report = simulate(settings, lambda hours: say(f"{hours:.2f} of {settings.hours:g} simulated hours"))
    if args.plot:
        write_plot(report, args.plot)
    if args.json:
        print(json.dumps(report.as_json()))
    else:
        Console().print(report.as_table())
    return 0
