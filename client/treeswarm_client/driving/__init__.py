"""Driven texts: the generation loop runs on a node near the others, in place of the client."""
