"""Find out whether other machines can dial this node, and lend or borrow ports for nodes that they cannot dial."""
