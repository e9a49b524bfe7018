"""Schedule steps, run the model and sample tokens on one device."""
