"""Drafting with what the tail's speculator proposes."""
