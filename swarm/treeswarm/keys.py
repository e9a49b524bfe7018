"""Signatures: who says so."""

from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


class Signer(Protocol):
    """Whoever holds a node's key."""

    @property
    def public_key(self) -> bytes:
        """Ed25519, 32 bytes."""
        ...

    def sign(self, data: bytes) -> bytes:
        """The signature, 64 bytes."""
        ...


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the owner of `public_key` signed `data`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
