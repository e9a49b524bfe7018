"""Speculators: they propose the next tree at the tail, from the hidden states of the target's last blocks."""
