"""`swarm bench disturbed`: the planner against injected faults of speed, on a virtual clock with scripted times."""
