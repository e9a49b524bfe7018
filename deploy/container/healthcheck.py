#!/usr/bin/env python3
"""Whether a program of treeswarm lives: `healthcheck.py URL` ends with 0 where it answers well, else with 1.

Of a node's metrics it also wants that the node has not left: one that is `gone` serves nobody any more.
"""

import sys
import urllib.request

# Less than the HEALTHCHECK's own timeout, so that this program says what was wrong.
ANSWER_S = 8.0
LEFT = 'treeswarm_node_state{state="gone"} 1.0'


def trouble(url: str) -> str | None:
    """What is wrong with whoever answers at `url`; None where nothing is."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
            said = answer.read().decode("utf-8", "replace")
    except OSError as error:  # refused, timed out, or a status from 400 on
        return f"{url} does not answer well: {error}"
    return f"{url}: the node has left the swarm" if LEFT in said.splitlines() else None


def main() -> int:
    """Exit status; the word goes to Docker's health log."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} URL", file=sys.stderr)
        return 1
    found = trouble(sys.argv[1])
    if found:
        print(found, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
