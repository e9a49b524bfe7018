"""`python -m treeswarm_client.lab`: an alias of `python -m treeswarm_bench.lab`."""

import sys
from importlib import import_module
from importlib.util import find_spec

from treeswarm.extras import install_command
from treeswarm_client.cli.measuring import PACKAGE


def main() -> int:
    """Run the WAN lab and return its exit status; 1 where the package `treeswarm_bench` is not installed."""
    if find_spec(PACKAGE) is None:
        print(f"lab: the WAN lab is not installed here: {install_command('bench')}", file=sys.stderr)
        return 1
    return int(import_module("treeswarm_bench.lab.__main__").main())


if __name__ == "__main__":
    sys.exit(main())
