"""The client library and the program `swarm`."""

from treeswarm_client.client import SwarmClient
from treeswarm_client.lookout import swarm_overview
from treeswarm_client.overview import Overview
from treeswarm_client.run import Run, Token
from treeswarm_client.stats import Stats
from treeswarm_client.sync import SyncSwarmClient

__all__ = ["Overview", "Run", "Stats", "SwarmClient", "SyncSwarmClient", "Token", "swarm_overview"]
