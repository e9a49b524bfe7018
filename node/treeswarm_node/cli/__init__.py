"""The program `swarm-node`: commands, flags, terminal output."""
