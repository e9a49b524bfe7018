"""Pure decisions about the whole swarm: placement, rebalancing, routing, bans and network coordinates."""
