"""The client library and the program `swarm`."""
