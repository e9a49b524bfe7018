"""gRPC channels of a transport: their options, and a cache of them and of the certificates they trust."""

from dataclasses import dataclass, field

import grpc

from treeswarm.errors import Unreachable
from treeswarm.keys import SERVER_NAME
from treeswarm.protocol.messages import MAX_MESSAGE_BYTES
from treeswarm.transport.seam import StreamKind
from treeswarm.transport.tls import Certificate

CONNECT_S = 5.0
# Each connection that was not made in time doubles the time of the next one there, up to so many times: on a loaded
# machine a handshake takes seconds, and the node lives.
MOST_PATIENCE = 4.0
# Number of idle connections kept for later use.  A node talks to some dozens of peers.
MAX_CHANNELS = 256

OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Home routers forget idle connections within minutes.  These keepalives detect a dead connection in 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]
CHANNEL_OPTIONS = [
    *OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Despite its name, this is how long one attempt may take.  At 200 ms, a peer whose handshake took 300 ms was out of
    # reach.
    ("grpc.min_reconnect_backoff_ms", int(2 * CONNECT_S * 1000)),
    # Without it, channels to one address share a connection, and large link messages delay control messages.
    ("grpc.use_local_subchannel_pool", 1),
]
SERVER_OPTIONS = [
    *OPTIONS,
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A port in use must be an error, not a second server on the same port.
    ("grpc.so_reuseport", 0),
    # A peer that connects and sends nothing holds a socket for at most this long; gRPC's default is two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
]


@dataclass(eq=False)
class ChannelCache:
    """Open channels, and the certificate and pin last seen at each address.  Addresses are `host:port`."""

    certificates: dict[str, Certificate] = field(default_factory=dict)
    """Certificate to trust at each address."""
    pins: dict[str, str] = field(default_factory=dict)
    """Pin last seen at each address; it is kept when a certificate is dropped."""
    channels: dict[tuple[str, StreamKind, str], grpc.aio.Channel] = field(default_factory=dict)
    """Channels by address, kind and pin, least recently used first."""
    late: dict[str, float] = field(default_factory=dict)
    """Factor of the time for the next connection to each address where the last one was not made in time."""
    closed: bool = False

    def connect_s(self, target: str, usual_s: float) -> float:
        """Return the seconds within which a connection must be made that usually takes less than `usual_s`."""
        return usual_s * self.late.get(target, 1.0)

    def note_connected(self, target: str, *, late: bool) -> None:
        """Note that a connection was made, or refused at once, or was not made in time (`late`)."""
        factor = self.late.pop(target, 1.0)
        if late:
            self.late[target] = min(2 * factor, MOST_PATIENCE)
            while len(self.late) > MAX_CHANNELS:
                self.late.pop(next(iter(self.late)))

    def check_open(self, target: str) -> None:
        """Raise Unreachable after `close`.

        Closing a transport wakes tasks that may dial again at once.  Nothing would ever close what they dialled.
        """
        if self.closed:
            raise Unreachable(f"cannot dial {target}: this transport was closed")

    def channel(
        self, target: str, kind: StreamKind, certificate: Certificate | None, send_limit: int
    ) -> grpc.aio.Channel:
        """Return an open channel, or a new one that trusts `certificate` alone (None: plaintext).

        Raises Unreachable after `close`.
        """
        self.check_open(target)  # It may have been closed while the certificate was fetched.
        key = (target, kind, certificate.pin if certificate else "")
        channel = self.channels.pop(key, None) or _new_channel(target, certificate, send_limit)
        self.channels[key] = channel
        return channel

    def evict_idle(self, in_use: set[str]) -> list[grpc.aio.Channel]:
        """Remove the least recently used channels above `MAX_CHANNELS`, and return them for the caller to close.

        Channels to the addresses `in_use` stay.  A client that opens a session names the next hop: no client may fill
        this machine with connections in this way.
        """
        idle = [key for key in self.channels if key[0] not in in_use]
        evicted = []
        for key in idle[: max(0, len(self.channels) - MAX_CHANNELS)]:
            self.certificates.pop(key[0], None)
            self.pins.pop(key[0], None)
            evicted.append(self.channels.pop(key))
        return evicted

    async def close(self) -> None:
        """Close every channel."""
        for channel in self.channels.values():
            await channel.close()
        self.channels.clear()


def _new_channel(target: str, certificate: Certificate | None, send_limit: int) -> grpc.aio.Channel:
    options = [*CHANNEL_OPTIONS, ("grpc.max_send_message_length", send_limit)]
    if certificate is None:
        return grpc.aio.insecure_channel(target, options=options)
    options.append(("grpc.ssl_target_name_override", SERVER_NAME))
    credentials = grpc.ssl_channel_credentials(root_certificates=certificate.pem)
    return grpc.aio.secure_channel(target, credentials, options=options)
