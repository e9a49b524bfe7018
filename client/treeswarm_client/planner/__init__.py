"""How much to speculate: the size of every round's tree, from what rounds cost and brought so far."""
