"""Structured output by llguidance: which tokens a grammar allows after every path of a tree."""
