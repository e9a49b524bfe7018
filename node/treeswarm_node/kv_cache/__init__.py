"""The KV cache: pages, prefixes, and the log that replays them."""
