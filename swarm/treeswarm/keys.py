"""Keys: one that signs a node's records, one for its TLS connections, and one that a private swarm shares."""

import datetime
import hashlib
import logging
import os
import re
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
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

from treeswarm.errors import BadRequest, DamagedFile
from treeswarm.protocol.records import node_id

log = logging.getLogger(__name__)

# Name in every node's certificate.  The pin identifies a node; a volunteer's host name would prove nothing.
SERVER_NAME = "treeswarm"
# Bytes of a SHA-256 that are used as pin.  Finding another key with the same 128 bits is infeasible, and a person can
# still read 32 digits aloud.
DIGEST_BYTES = 16
# A pin is valid for as long as its key.  The certificate is valid at all times, so that a wrong clock does no harm.
VALID_FROM = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
VALID_UNTIL = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
# A machine that records one proof of a swarm key can guess at the key offline, without limit.
SWARM_KEY_BYTES = 16
# Text with fewer different characters than this was not drawn at random.
SWARM_KEY_VARIETY = 8
# More than the size of any file with two keys and a certificate.
FILE_BYTES = 1 << 16
PRIVATE = 0o600
IDENTITY_PARTS = 3
MARKER_DIGITS = 5
PEM = re.compile(rb"-----BEGIN [^-]+-----\n.*?-----END [^-]+-----\n", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Identity:
    """A node's keys: Ed25519 for signatures, P-256 for TLS, because gRPC does not accept Ed25519 certificates."""

    signing_key: Ed25519PrivateKey = field(repr=False)
    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)

    @classmethod
    def ephemeral(cls) -> "Identity":
        """Return a new identity, which is not stored."""
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(Ed25519PrivateKey.generate(), _private_pem(key), _certificate(key))

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """Return the identity in the file `path`, which is created if it is missing.

        Raises BadRequest when other users can read the file, when it is damaged, and when it can be neither read nor
        created.
        """
        try:
            if not path.exists():
                identity = cls.ephemeral()
                write_private(path, _private_pem(identity.signing_key) + identity.key_pem + identity.certificate_pem)
                return identity
            return cls._parse(_read_private(path), path)
        except OSError as error:
            raise BadRequest(
                f"the identity file {path} can be neither read nor created ({error.strerror}): "
                "give a path of your own with --identity PATH"
            ) from None

    @classmethod
    def _parse(cls, pem: bytes, path: Path) -> "Identity":
        try:
            parts = PEM.findall(pem)
            if len(parts) != IDENTITY_PARTS:
                raise ValueError(f"it has {len(parts)} keys and certificates instead of {IDENTITY_PARTS}")
            signing_pem, key_pem, certificate_pem = parts
            signing_key, key = load_pem_private_key(signing_pem, None), load_pem_private_key(key_pem, None)
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            if not isinstance(signing_key, Ed25519PrivateKey) or certificate.public_key() != key.public_key():
                raise ValueError("its parts do not belong together")
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            log.debug("%s: %s", path, error)  # these words of OpenSSL help nobody else
            reason = f" ({error})" if str(error).startswith("it") else ""
            raise damaged_file("identity file", path, reason, "the node is then another one, with a new pin") from None
        return cls(signing_key, key_pem, certificate_pem)

    @cached_property
    def public_key(self) -> bytes:
        """Ed25519 public key, 32 bytes, for `verify`."""
        return self.signing_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @cached_property
    def node_id(self) -> str:
        """Id of the node, 32 hex digits."""
        return node_id(self.public_key)

    @cached_property
    def pin(self) -> str:
        """Pin of the TLS key, 32 hex digits, which an address may contain: `host:port#pin`."""
        return pin_of(x509.load_pem_x509_certificate(self.certificate_pem).public_bytes(Encoding.DER))

    def sign(self, data: bytes) -> bytes:
        """Return the Ed25519 signature of `data`, 64 bytes."""
        return self.signing_key.sign(data)


class Signer(Protocol):
    """Holder of a node's signing key."""

    @property
    def public_key(self) -> bytes:
        """Ed25519 public key, 32 bytes."""
        ...

    def sign(self, data: bytes) -> bytes:
        """Return the signature of `data`, 64 bytes."""
        ...


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Return whether `signature` over `data` was made with that key.  Malformed keys and signatures give False."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def new_raw_key() -> tuple[bytes, bytes]:
    """Return a new Ed25519 key as private and public half, 32 bytes each, for libraries with their own file format."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def pin_of(certificate_der: bytes) -> str:
    """Return the pin of a certificate's key, 32 hex digits.  The rest of the certificate may change.

    Raises ValueError if the bytes are no certificate.
    """
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()[:DIGEST_BYTES].hex()


def read_swarm_key(source: Path | str) -> bytes:
    """Return a private swarm's key from a file (Path) or from its text (str).

    Raises BadRequest if the file is missing or readable by other users, or if the key is too easy to guess.
    """
    try:
        text = _read_private(source).strip() if isinstance(source, Path) else source.strip().encode()
    except OSError as error:
        raise BadRequest(
            f"the swarm key file {source} cannot be read ({error.strerror}): copy it from a member of the swarm, or "
            f"create the key of a new swarm with: (umask 077; openssl rand -hex 32 > {source})"
        ) from None
    if len(text) < SWARM_KEY_BYTES or len(set(text)) < SWARM_KEY_VARIETY:
        raise BadRequest(
            f"the swarm key is too easy to guess: give at least {SWARM_KEY_BYTES} random characters, such as the "
            "output of openssl rand -hex 32"
        )
    return text


def _private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _certificate(key: ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    builder = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_UNTIL)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def key_marker(swarm_key: bytes | None) -> str:
    """Return a fingerprint of a private swarm's key, 5 hex digits, which shows that a key is missing or wrong.

    It is "" for an open swarm.  It tells 20 bits of the key and no more: of all keys that an attacker guesses, one in a
    million has the same marker.
    """
    if swarm_key is None:
        return ""
    return hashlib.sha256(b"treeswarm swarm key marker\n" + swarm_key).hexdigest()[:MARKER_DIGITS]


def damaged_file(kind: str, path: Path, reason: str, consequence: str) -> DamagedFile:
    """Return the error for a file of this program's that it cannot use any more."""
    return DamagedFile(f"the {kind} {path} is damaged{reason}: restore it from a backup, or delete it ({consequence})")


def write_private(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write a file that only its owner can read, whole or not at all.

    Raises OSError, also if the file exists, unless it may be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not replace and path.exists():
            raise FileExistsError(f"{path} exists")
        os.replace(name, path)  # noqa: PTH105  # one system call
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _read_private(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if os.name == "posix" and mode & ~0o700:
            raise BadRequest(
                f"other users of this machine can read the secret in {path} (mode {mode:04o}): run chmod 600 {path}; "
                "if they may have read it, create a new one"
            )
        return file.read(FILE_BYTES)
