"""The planner: how many nodes to draft and to ship each round, from what rounds cost and brought so far."""
