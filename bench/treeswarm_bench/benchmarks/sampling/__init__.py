"""Shared noise beside trees that are sampled from the draft and verified by rejection."""
