"""The token tree and the pure state machine of a session."""
