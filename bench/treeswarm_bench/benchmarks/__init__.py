"""Benchmarks that anyone can repeat: most of them start the shipped `swarm-node` in processes of its own."""
