"""The parallel kind of speculator: one layer guesses a block of positions in one pass."""
