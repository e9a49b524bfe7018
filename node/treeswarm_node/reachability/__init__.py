"""Whether other machines can dial this node, and ports lent to nodes that they cannot dial."""
