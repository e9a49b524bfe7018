"""The messages and records that clients and nodes exchange, as plain data."""
