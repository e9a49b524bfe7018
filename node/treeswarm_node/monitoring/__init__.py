"""Collect a node's figures, and serve them to its owner's panel and to Prometheus."""
