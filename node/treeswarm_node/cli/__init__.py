"""The command line of `swarm-node`: commands, flags and terminal output."""
