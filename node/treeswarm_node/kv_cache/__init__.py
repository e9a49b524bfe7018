"""Keep the K and V of sessions in pages, share prefixes, and log activations for replay."""
