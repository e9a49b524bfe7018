"""Loading a span of a model, and proving that it computes what transformers computes."""
