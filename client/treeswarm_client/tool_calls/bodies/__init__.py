"""The bodies of calls in the formats of all families: each reads what a model writes, and writes the grammar of it."""
