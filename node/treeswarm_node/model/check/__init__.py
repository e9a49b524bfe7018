"""Checks at load: a span computes what transformers computes, and its device computes correctly."""
