"""Training of speculators: `swarm train-speculator`."""
