"""The client library and the program `swarm`."""

from typing import TYPE_CHECKING, Any

from treeswarm_client.client import SwarmClient
from treeswarm_client.discovery.overview import Overview
from treeswarm_client.discovery.prober import swarm_overview
from treeswarm_client.generation.run import Run, Token
from treeswarm_client.generation.stats import Stats
from treeswarm_client.sync import SyncSwarmClient

if TYPE_CHECKING:
    from treeswarm_client.hf import AutoSwarmModelForCausalLM

__all__ = [
    "AutoSwarmModelForCausalLM",
    "Overview",
    "Run",
    "Stats",
    "SwarmClient",
    "SyncSwarmClient",
    "Token",
    "swarm_overview",
]


def __getattr__(name: str) -> Any:
    """Import the class that needs torch and transformers on its first use."""
    if name != "AutoSwarmModelForCausalLM":
        raise AttributeError(f"module 'treeswarm_client' has no attribute '{name}'")
    try:
        from treeswarm_client.hf import AutoSwarmModelForCausalLM  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            f"{name} needs torch and transformers: pip install 'treeswarm[draft]' ({error.name} is missing)"
        ) from error
    return AutoSwarmModelForCausalLM
