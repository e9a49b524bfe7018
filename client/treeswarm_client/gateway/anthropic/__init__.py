"""Anthropic's messages: their requests and their answers."""
