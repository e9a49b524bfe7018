"""The wire: generated protobuf and the codec that checks it."""
