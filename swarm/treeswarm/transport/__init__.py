"""Transports: one interface for message streams, with an in-memory and a gRPC implementation."""
