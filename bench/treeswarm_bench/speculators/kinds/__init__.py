"""Kinds of speculators that nodes do not serve, and how all kinds are compared (docs/decisions/078)."""
