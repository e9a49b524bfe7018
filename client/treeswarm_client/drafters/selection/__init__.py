"""Find a draft model for a target: a bundled one, or the small model of its family if that is on this machine."""
