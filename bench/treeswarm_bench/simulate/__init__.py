"""A swarm of thousands of nodes in virtual time, deciding with the very code that real nodes and clients use."""
