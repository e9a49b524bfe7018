"""Simulates a swarm of thousands of nodes in virtual time with the decision code of real nodes and clients."""
