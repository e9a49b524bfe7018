"""Answers, whatever API they are for: their pieces, the writers of the APIs, and how they are sent."""
