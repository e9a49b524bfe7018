"""Who a node is: a key that signs what it says of itself, a key for its connections, and the key a swarm shares."""

import datetime
import hashlib
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from treeswarm.errors import BadRequest
from treeswarm.protocol.records import node_id

# The name in every node's certificate.  A pin says who it is; a volunteer's host name would say nothing.
SERVER_NAME = "treeswarm"
# Of a SHA-256: another key of the same 128 bits is out of reach, and 32 digits can still be read aloud.
DIGEST_BYTES = 16
# A pin lasts as long as its key: a node whose clock is wrong is still itself, so every moment is within.
VALID_FROM = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
VALID_UNTIL = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
# Whoever hears one proof of a swarm key may guess at the key for ever.
SWARM_KEY_BYTES = 16
# Fewer different characters than this were not drawn at random.
SWARM_KEY_VARIETY = 8
# Above any file of two keys and a certificate.
FILE_BYTES = 1 << 16
PRIVATE = 0o600
PEM = re.compile(rb"-----BEGIN [^-]+-----\n.*?-----END [^-]+-----\n", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Identity:
    """A node's keys.  Ed25519 signs; P-256 is for TLS, because gRPC's does not take Ed25519 certificates."""

    signing_key: Ed25519PrivateKey = field(repr=False)
    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)

    @classmethod
    def ephemeral(cls) -> "Identity":
        """A new one, kept nowhere."""
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(Ed25519PrivateKey.generate(), _private_pem(key), _certificate(key))

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """The one kept in a file, made at the first start.  Raises BadRequest when others can read the file, when it is
        damaged, and when it can be neither read nor made."""
        try:
            if not path.exists():
                made = cls.ephemeral()
                _write_private(path, _private_pem(made.signing_key) + made.key_pem + made.certificate_pem)
                return made
            return cls._parse(_read_private(path), path)
        except OSError as error:
            raise BadRequest(
                f"the identity file {path} can be neither read nor made ({error.strerror}): "
                "give a path of your own with --identity PATH"
            ) from None

    @classmethod
    def _parse(cls, pem: bytes, path: Path) -> "Identity":
        try:
            signing_pem, key_pem, certificate_pem = PEM.findall(pem)
            signing_key, key = load_pem_private_key(signing_pem, None), load_pem_private_key(key_pem, None)
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            if not isinstance(signing_key, Ed25519PrivateKey) or certificate.public_key() != key.public_key():
                raise ValueError("its parts do not belong together")
        except (ValueError, TypeError) as error:
            raise BadRequest(
                f"the identity file {path} is damaged ({error}): put its backup back, or move it away and the node "
                "makes a new identity at its next start, under another id and pin"
            ) from None
        return cls(signing_key, key_pem, certificate_pem)

    @cached_property
    def public_key(self) -> bytes:
        """32 bytes, which `verify` takes."""
        return self.signing_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @cached_property
    def node_id(self) -> str:
        """32 hex digits."""
        return node_id(self.public_key)

    @cached_property
    def pin(self) -> str:
        """32 hex digits, which an address may carry: `host:port#pin`."""
        return pin_of(x509.load_pem_x509_certificate(self.certificate_pem).public_bytes(Encoding.DER))

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        return self.signing_key.sign(data)


class Signer(Protocol):
    """Whoever holds a node's signing key."""

    @property
    def public_key(self) -> bytes:
        """Ed25519, 32 bytes."""
        ...

    def sign(self, data: bytes) -> bytes:
        """The signature, 64 bytes."""
        ...


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether `signature` is that key's under `data`; False also for what is no key or no signature."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def new_raw_key() -> tuple[bytes, bytes]:
    """A new Ed25519 key, private and public half, 32 bytes each; for libraries with a file format of their own."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def pin_of(certificate_der: bytes) -> str:
    """What names a certificate's key; the rest of the certificate may change.  Raises ValueError for no certificate."""
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()[:DIGEST_BYTES].hex()


def read_swarm_key(source: Path | str) -> bytes:
    """A private swarm's key from a file, or from its text.  Raises BadRequest for one missing, short or no secret."""
    try:
        text = _read_private(source).strip() if isinstance(source, Path) else source.strip().encode()
    except OSError as error:
        raise BadRequest(
            f"the swarm key file {source} cannot be read ({error.strerror}): copy it from a member of the swarm, or "
            f"make a new swarm's with: (umask 077; openssl rand -hex 32 > {source})"
        ) from None
    if len(text) < SWARM_KEY_BYTES or len(set(text)) < SWARM_KEY_VARIETY:
        raise BadRequest(
            f"the swarm key is too easy to guess: give at least {SWARM_KEY_BYTES} random characters, such as "
            "openssl rand -hex 32 makes"
        )
    return text


def _private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _certificate(key: ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    made = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_UNTIL)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _write_private(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "wb") as file:
        file.write(data)


def _read_private(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if os.name == "posix" and mode & ~0o700:
            raise BadRequest(
                f"others on this machine can read the secret in {path} (mode {mode:04o}): run chmod 600 {path}; if "
                "others may have read it, make a new one"
            )
        return file.read(FILE_BYTES)
