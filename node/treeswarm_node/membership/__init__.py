"""A node's membership in a swarm: its identity, its record, and its distances to the others."""
