"""Kinds of speculators that nodes do not serve: they are trained and compared here."""
