"""`swarm serve`: a swarm behind the HTTP interface that OpenAI's clients speak."""
