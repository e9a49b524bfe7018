"""OpenAI's chat and text completions: their requests and their answers."""
