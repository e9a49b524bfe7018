"""Pure decisions over the swarm: placement, routing, rebalancing, bans."""
