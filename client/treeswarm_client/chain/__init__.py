"""The chain of nodes that serves one session: opening it, sending to it, watching it and repairing it."""
