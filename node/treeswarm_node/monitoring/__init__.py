"""A node's figures, for its owner and for Prometheus."""
