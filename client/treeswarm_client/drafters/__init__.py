"""Drafters: who guesses what the target will say."""
