#!/usr/bin/env python3
"""Whether a program of treeswarm is well: `treeswarm-healthcheck URL [STATE]` ends with 0 where it is, else with 1.

Well is who answers at URL with success; with STATE, such as `online`, URL is a node's metrics, and the node must be in
that state.
"""

import sys
import urllib.request

# Less than the HEALTHCHECK's own timeout, so that this program says what was wrong.
ANSWER_S = 8.0


def trouble(url: str, state: str | None = None) -> str | None:
    """What is wrong with whoever answers at `url`; None where nothing is."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
            said = answer.read().decode("utf-8", "replace")
    except OSError as error:  # refused, timed out, or a status from 400 on
        return f"{url} does not answer well: {error}"
    wanted = f'treeswarm_node_state{{state="{state}"}} 1.0'
    return f"{url}: the node is not {state}" if state and wanted not in said.splitlines() else None


def main() -> int:
    """Exit status; the word goes to Docker's health log."""
    if len(sys.argv) not in (2, 3):
        print(f"usage: {sys.argv[0]} URL [STATE]", file=sys.stderr)
        return 1
    found = trouble(*sys.argv[1:])
    if found:
        print(found, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
