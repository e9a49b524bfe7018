"""The client library and the program `swarm`.

Names are imported on their first use: the program must answer a wrong command line, or Ctrl-C, before it has loaded
anything large.
"""

TYPE_CHECKING = False  # typing's own takes as long to import as all else that the program needs for its first line
if TYPE_CHECKING:
    from typing import Any

    from treeswarm.protocol.text_rules import Grammar, TextRules
    from treeswarm_client.client import SwarmClient
    from treeswarm_client.discovery.overview import Overview
    from treeswarm_client.discovery.prober import swarm_overview
    from treeswarm_client.generation.run import Run, Token
    from treeswarm_client.generation.stats import Stats
    from treeswarm_client.hf import AutoSwarmModelForCausalLM
    from treeswarm_client.sync import SyncSwarmClient

__all__ = [
    "AutoSwarmModelForCausalLM",
    "Grammar",
    "Overview",
    "Run",
    "Stats",
    "SwarmClient",
    "SyncSwarmClient",
    "TextRules",
    "Token",
    "swarm_overview",
]

MODULES = {
    "AutoSwarmModelForCausalLM": "treeswarm_client.hf",
    "Grammar": "treeswarm.protocol.text_rules",
    "Overview": "treeswarm_client.discovery.overview",
    "Run": "treeswarm_client.generation.run",
    "Stats": "treeswarm_client.generation.stats",
    "SwarmClient": "treeswarm_client.client",
    "SyncSwarmClient": "treeswarm_client.sync",
    "TextRules": "treeswarm.protocol.text_rules",
    "Token": "treeswarm_client.generation.run",
    "swarm_overview": "treeswarm_client.discovery.prober",
}
"""Module that defines each name."""


def __getattr__(name: str) -> "Any":
    """Import a name of the library, which stays here afterwards."""
    from importlib import import_module  # noqa: PLC0415

    if name not in MODULES:
        raise AttributeError(f"module 'treeswarm_client' has no attribute '{name}'")
    from treeswarm.programs.interrupts import ticking  # noqa: PLC0415

    try:
        # torch and transformers take 6 s on an idle machine.
        with ticking(f"importing what {name} needs", 0.5):
            value = getattr(import_module(MODULES[name]), name)
    except ImportError as error:
        from treeswarm.extras import install_command, missing_modules  # noqa: PLC0415

        if name != "AutoSwarmModelForCausalLM" or not missing_modules("draft"):
            raise
        raise ImportError(
            f"{name} needs torch and transformers: {install_command('draft')} ({error.name} is missing)"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the names of the library, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
