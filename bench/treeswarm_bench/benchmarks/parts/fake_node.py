"""A node that exists as a key alone: it signs records for the registries' bench and tests."""

import time
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import LIFETIME_S, NodeRecord, NodeState, SealedRecord, node_id
from treeswarm.protocol.spans import Span
from treeswarm.wire.sealing import seal

MODEL = "ab" * 32


@dataclass
class FakeNode:
    """A key, and the records signed with it.  Each record has a higher generation than the one before."""

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    generation: int = 0

    @property
    def public_key(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    @property
    def id(self) -> str:
        return node_id(self.public_key)

    def sign(self, data: bytes) -> bytes:
        return self.key.sign(data)

    def record(self, port: int = 4001, **changes: Any) -> SealedRecord:
        """Sign a new record for an address at `port`, with some fields changed."""
        self.generation = max(self.generation + 1, time.time_ns() // 1000)
        fields: dict[str, Any] = {
            "key": self.public_key,
            "generation": self.generation,
            "expires": int(time.time()) + LIFETIME_S,
            "state": NodeState.ONLINE,
            "address": f"127.0.0.1:{port}",
            "pin": "0f" * 16,
            "reachable": True,
            "name": "demo",
            "model": MODEL,
            "numerics": NumericsClass("01" * 32, "float32", ""),
            "span": Span(0, 4),
            "blocks": 8,
            "rate": 1000.0,
            "hop_s": 2.0**-9,  # Floats are float32 on the wire.
            "free_tokens": 4096,
            "total_tokens": 8192,
            "coordinate": (0.25, 0.5),
            "software": "test",
        }
        return seal(NodeRecord(**fields | changes), self)
