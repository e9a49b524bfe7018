"""Ways to decode over a WAN: the matrix of `swarm bench wan`, its virtual twin, and its pictures."""
