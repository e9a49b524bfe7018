"""How messages travel: one seam, an in-memory form and a gRPC form."""
