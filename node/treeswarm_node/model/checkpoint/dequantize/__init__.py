"""Read weights that a checkpoint stores in fewer bits: which tensors form a weight, and what numbers they mean."""
