"""The server's side of sessions: streams in, streams out."""
