"""The command `swarm chat`."""
