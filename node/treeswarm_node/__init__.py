"""The program `swarm-node`: hosts a span of a model's decoder blocks."""
