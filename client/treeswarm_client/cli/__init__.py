"""The program `swarm`."""
