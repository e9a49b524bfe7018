"""Benchmarks that anyone can repeat: they start the shipped `swarm-node` in processes of its own."""
