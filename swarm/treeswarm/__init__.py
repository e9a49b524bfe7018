"""Core that nodes and clients share: protocol, session state, transports and registries."""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
