"""What the client knows of the swarm, and the routes it chooses."""
