"""The tensors of a checkpoint: which of its files hold those of a span, and how they become those of its modules."""
