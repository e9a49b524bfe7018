"""A node's part in the registry: its record, its identity, its distances."""
