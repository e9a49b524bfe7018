"""A transport codec whose messages are plain bytes."""

from treeswarm.transport.grpc_streams import Codec
from treeswarm.transport.seam import StreamKind

# For benchmarks that measure a connection, or send bytes that no treeswarm program would send.
RAW = Codec(bytes, up=dict.fromkeys(StreamKind, bytes), down=dict.fromkeys(StreamKind, bytes))
