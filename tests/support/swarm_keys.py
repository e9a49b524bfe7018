"""Keys of private swarms for tests."""

import secrets


def new_swarm_key() -> str:
    """Return the text of a new swarm key file, as `openssl rand -hex 32` makes it."""
    return secrets.token_hex(32)
