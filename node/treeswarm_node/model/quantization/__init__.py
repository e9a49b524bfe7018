"""Weights in fewer bits, and the kernels that compute with them."""
