"""Authentication of the other end: certificates checked by pin, and proofs of knowing a private swarm's key.

gRPC verifies a server against root certificates and a name, never against a pin.  So the certificate is fetched first,
compared with the pin, and then given to gRPC as the only root.  gRPC then connects to the holder of that key only.
"""

import asyncio
import hashlib
import hmac
import os
import socket
import ssl
from dataclasses import dataclass, field
from enum import StrEnum

from treeswarm.errors import BadRequest, Impostor, Refused, Unreachable
from treeswarm.keys import SERVER_NAME, Identity, pin_of
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import FaultCode
from treeswarm.tasks import STAGGER_S

PROOF_KEY = "treeswarm-swarm-key"
GRPC_PROTOCOL = "h2"


@dataclass(frozen=True)
class Certificate:
    """A certificate whose key a server has proved to hold."""

    pem: bytes
    pin: str


class Role(StrEnum):
    """Role of the end that makes a proof, so that one end's proof cannot be sent back as the other's."""

    DIALLER = "dialler"
    ACCEPTOR = "acceptor"


@dataclass(frozen=True)
class Security:
    """Keys that protect a transport's connections."""

    identity: Identity | None = None
    """Keys that listeners present, or None for an end that only dials."""
    swarm_key: bytes | None = field(default=None, repr=False)
    """Key of a private swarm, or None for an open swarm.  Peers that do not know it are refused, in both directions."""

    def listener_identity(self) -> Identity:
        """Return the identity.  Raises BadRequest for an end that only dials."""
        if self.identity is None:
            raise BadRequest("listening with TLS needs an identity: give one, such as Identity.ephemeral()")
        return self.identity

    def proof(self, role: Role, server_pin: str) -> tuple[tuple[str, str], ...]:
        """Return the call metadata that proves knowledge of the swarm key; empty for an open swarm.

        The proof is bound to the server's own key: one that a machine in the middle records is valid for that server
        only.
        """
        if self.swarm_key is None:
            return ()
        return ((PROOF_KEY, hmac.new(self.swarm_key, f"{role}|{server_pin}".encode(), hashlib.sha256).hexdigest()),)

    def proves_key(self, role: Role, server_pin: str, metadata: dict[str, str | bytes]) -> bool:
        """Return whether `metadata` proves that the other end, in that role, knows the swarm key.

        It is always True for an open swarm.
        """
        return all(
            hmac.compare_digest(expected.encode(), _as_bytes(metadata.get(name, b"")))
            for name, expected in self.proof(role, server_pin)
        )

    def check_dialler(self, metadata: dict[str, str | bytes]) -> None:
        """Raise Refused for a dialler that is no member of this private swarm."""
        if not self.proves_key(Role.DIALLER, self.listener_identity().pin, metadata):
            reason = (
                "another swarm key, or took another machine for this node" if PROOF_KEY in metadata else "no swarm key"
            )
            raise Refused(
                f"this is a private swarm, and the caller has {reason}: ask a member of the swarm for its key file, "
                "and start with --swarm-key PATH",
                FaultCode.WRONG_SWARM_KEY,
            )

    def check_acceptor(self, target: str, server_pin: str, metadata: dict[str, str | bytes]) -> None:
        """Raise Refused for a node at `target` that is no member of this private swarm."""
        if not self.proves_key(Role.ACCEPTOR, server_pin, metadata):
            raise Refused(
                f"{target} does not know this private swarm's key: start it with the same --swarm-key PATH, or leave "
                "--swarm-key out here to use an open swarm; nothing was sent to it",
                FaultCode.WRONG_SWARM_KEY,
            )


def unreachable(target: str, reason: str) -> Unreachable:
    """Return the error for an address that does not answer."""
    return Unreachable(
        f"no answer from {target} ({reason}): check the address, that the node runs, and any firewall between"
    )


def check_pin(address: Address, certificate: Certificate) -> None:
    """Raise Impostor if the address has a pin and the certificate another."""
    if not address.admits(certificate.pin):
        raise Impostor(
            f"{address.bare} answered with the key {certificate.pin} instead of {address.pin}: a machine in the middle "
            "may be there, or the node was set up anew; ask its owner for its address with #pin, nothing was sent"
        )


async def fetch_certificate(address: Address, within_s: float) -> Certificate:
    """Return the certificate of the server at an address, without judging it, within `within_s` seconds.

    Raises Unreachable.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # Only the pin can tell whether it is the right server.
    context.set_alpn_protocols([GRPC_PROTOCOL])
    try:
        async with asyncio.timeout(within_s):
            # A name may have several addresses, of which one is a black hole: often the one for IPv6.
            _, writer = await asyncio.open_connection(
                address.host, address.port, ssl=context, server_hostname=SERVER_NAME, happy_eyeballs_delay=STAGGER_S
            )
    except TimeoutError:
        raise unreachable(address.bare, "no answer in time") from None
    except ssl.SSLError as error:
        raise _not_a_node(address, error.reason or str(error)) from None
    except OSError as error:
        raise unreachable(address.bare, _reason(error)) from None
    try:
        connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
        der = connection.getpeercert(binary_form=True)
        if der is None or connection.selected_alpn_protocol() != GRPC_PROTOCOL:
            raise _not_a_node(address, "its TLS is for another protocol")
        return Certificate(ssl.DER_cert_to_PEM_cert(der).encode(), pin_of(der))
    except ValueError as error:
        raise _not_a_node(address, str(error)) from None
    finally:
        writer.transport.abort()  # An orderly close would wait for the other end.


def _reason(error: OSError) -> str:
    """Return the system's words for a failed connection; asyncio puts "Connect call failed" in their place."""
    if error.errno and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno).lower()
    return error.strerror or str(error)


def _not_a_node(address: Address, reason: str) -> Unreachable:
    return Unreachable(
        f"the server at {address.bare} is no swarm-node ({reason}): check the port, and that "
        "the node there has the same release"
    )


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
