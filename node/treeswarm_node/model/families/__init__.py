"""What distinguishes model families: where their layers, positions, masks and KV rows are."""
