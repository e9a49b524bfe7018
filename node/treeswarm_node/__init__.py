"""The program `swarm-node`, which hosts a span of a model's decoder blocks."""
