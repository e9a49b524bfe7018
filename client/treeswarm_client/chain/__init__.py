"""The chain of nodes that serves one session: sending, watching, repairing."""
