"""The engine: scheduling, model execution and sampling on one device."""
