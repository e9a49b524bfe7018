"""Sessions on a node: admission, the control and link streams, and what each session holds."""
