"""OpenAI's responses: their requests and their answers."""
