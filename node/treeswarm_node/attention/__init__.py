"""Compute attention over a paged trunk and a tree-shaped crown."""
