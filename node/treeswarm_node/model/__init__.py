"""Load a span of a model, and check that it computes what transformers computes."""
