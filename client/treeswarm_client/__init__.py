"""The client library and the program `swarm`."""

from treeswarm_client.client import Run, SwarmClient, Token
from treeswarm_client.stats import Stats
from treeswarm_client.sync import SyncSwarmClient

__all__ = ["Run", "Stats", "SwarmClient", "SyncSwarmClient", "Token"]
