"""`python -m treeswarm_bench.lab`: a lab to try things in by hand."""

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
        _tell(lab)
        process = await asyncio.create_subprocess_exec(*lab.command(hosts[0], *command))
        return await process.wait()


def _tell(lab: Lab) -> None:
    for host in lab.hosts:
        print(f"{host.address}  {host.name}: {' '.join(lab.command(host.name, 'COMMAND'))}", file=sys.stderr)


def main() -> int:
    """The command's exit status, or 1 after an error told in one line."""
    made = argparse.ArgumentParser(
        prog="python -m treeswarm_bench.lab",
        description="Run a command on the first of several hosts that are namespaces of this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--hosts", default="client,a,b", help="their names (default client,a,b)")
    made.add_argument("--link", default="delay=25ms", help="between any two (default delay=25ms)")
    made.add_argument("--congestion", help="TCP congestion control: cubic, reno or bbr (default: the system's)")
    made.add_argument("command", nargs="*", help="default: a shell")
    args = made.parse_args()
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
