"""What a node and a client share: the token tree, the session, the wire."""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
