#!/usr/bin/env python3
"""Check the health of a treeswarm program: `treeswarm-healthcheck URL [STATE]` ends with 0 if it is healthy, else 1.

A program is healthy if it answers at URL with success.  With STATE, such as `online`, URL must be a node's metrics, and
the node must be in that state.
"""

import sys
import urllib.request

# Less than the HEALTHCHECK's own timeout, so that this program can still say what is wrong.
ANSWER_S = 8.0


def find_problem(url: str, state: str | None = None) -> str | None:
    """Return what is wrong with the program that answers at `url`, or None if it is healthy."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as response:
            text = response.read().decode("utf-8", "replace")
    except OSError as error:  # refused, timed out, or a status from 400 on
        return f"{url} does not answer with success: {error}"
    metric = f'treeswarm_node_state{{state="{state}"}} 1.0'
    return f"{url}: the node is not {state}" if state and metric not in text.splitlines() else None


def main() -> int:
    """Return the exit status; what is printed goes to Docker's health log."""
    if len(sys.argv) not in (2, 3):
        print(f"usage: {sys.argv[0]} URL [STATE]", file=sys.stderr)
        return 1
    problem = find_problem(*sys.argv[1:])
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
