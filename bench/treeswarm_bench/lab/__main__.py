"""`python -m treeswarm_bench.lab` makes a lab and runs a command in it, a shell by default."""

import argparse
import asyncio
import os
import sys

from treeswarm.errors import SwarmError
from treeswarm_bench.lab import Lab, LabLink, wan_lab

EPILOG = """example, as root:
  python -m treeswarm_bench.lab --hosts client,a,b --link delay=25ms,rate=100mbit -- ping -c 3 10.78.0.2"""


async def _run(hosts: list[str], link: LabLink, congestion: str | None, command: list[str]) -> int:
    async with wan_lab(hosts, link, congestion=congestion) as lab:
        _print_hosts(lab)
        process = await asyncio.create_subprocess_exec(*lab.command(hosts[0], *command))
        return await process.wait()


def _print_hosts(lab: Lab) -> None:
    for host in lab.hosts:
        print(f"{host.address}  {host.name}: {' '.join(lab.command(host.name, 'COMMAND'))}", file=sys.stderr)


def main() -> int:
    """Return the exit status of the command, or 1 after printing an error in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m treeswarm_bench.lab",
        description="Run a command on the first of several hosts that are namespaces of this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hosts", default="client,a,b", help="names of the hosts (default client,a,b)")
    parser.add_argument("--link", default="delay=25ms", help="link between any two hosts (default delay=25ms)")
    parser.add_argument("--congestion", help="TCP congestion control: cubic, reno or bbr (default: the system's)")
    parser.add_argument("command", nargs="*", help="command to run on the first host (default: a shell)")
    args = parser.parse_args()
    command = args.command or [os.environ.get("SHELL", "/bin/sh")]
    try:
        return asyncio.run(_run(args.hosts.split(","), LabLink.parse(args.link), args.congestion, command))
    except SwarmError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
