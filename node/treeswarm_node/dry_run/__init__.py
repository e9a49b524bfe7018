"""What a node would do with a model, told from config and headers: `swarm-node MODEL --dry-run`."""
