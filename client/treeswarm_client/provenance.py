"""Describes what a measurement ran on: machine, versions, weights, and the work of every node."""

import datetime
import os
import platform
from importlib.metadata import version
from typing import Any

from treeswarm.errors import SwarmError
from treeswarm_client.client import SwarmClient

PACKAGES = ("treeswarm", "torch", "transformers", "grpcio", "numpy")


def machine_provenance() -> dict[str, Any]:
    """Return the time in UTC, the processor and system, and the versions of the packages that compute."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


async def chain_provenance(client: SwarmClient) -> dict[str, Any]:
    """Return the weights, the dtype and the work of each node of the client's chain, in the order of blocks.

    Raises SwarmError if a node of the chain no longer answers: a measurement without it does not count.
    """
    descriptions = await client.describe_nodes(client.addresses)
    if len(descriptions) != len(client.addresses):
        raise SwarmError(
            f"only {len(descriptions)} of {len(client.addresses)} nodes of the chain still answer: "
            "discard the measurement and repeat it"
        )
    return {
        "weights": client.target.numerics.weights,
        "dtype": client.target.numerics.dtype,
        "nodes": [
            {
                "blocks": str(node.span),
                "attention": node.attention,
                "frames": node.frames,
                "forwards": node.forwards,
                "sessions_per_forward": node.forward_sessions / node.forwards if node.forwards else 0.0,
            }
            for node in descriptions.values()
        ],
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as lines:  # noqa: PTH123  # a kernel file
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
