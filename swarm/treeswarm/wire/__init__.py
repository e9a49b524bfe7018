"""Wire format: generated protobuf code, and the codec that converts and checks messages."""
