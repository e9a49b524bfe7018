"""What single parts of the system cost, measured without a swarm."""
