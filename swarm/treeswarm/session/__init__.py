"""The token tree of a session, and the state machine that a node keeps for it.  Pure."""
