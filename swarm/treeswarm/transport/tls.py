"""Who is at the other end: certificates by pin, and proofs of knowing a private swarm's key.

gRPC verifies a server against roots and a name, never against a pin.  So the certificate is fetched first, compared
with the pin, and then given to gRPC as the only root: gRPC itself then talks to the holder of that key or to nobody.
"""

import asyncio
import hashlib
import hmac
import ssl
from dataclasses import dataclass, field
from enum import StrEnum

from treeswarm.errors import BadRequest, Impostor, Refused, Unreachable
from treeswarm.keys import SERVER_NAME, Identity, pin_of
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import FaultCode

PROOF_KEY = "treeswarm-swarm-key"
GRPC_PROTOCOL = "h2"


@dataclass(frozen=True)
class Certificate:
    """What a server showed, and proved to hold the key of."""

    pem: bytes
    pin: str


class Role(StrEnum):
    """Who proves, so that neither end's proof can be given back as the other's."""

    DIALLER = "dialler"
    ACCEPTOR = "acceptor"


@dataclass(frozen=True)
class Security:
    """How a transport's connections are protected."""

    identity: Identity | None = None
    """Shown by listeners; None: this end only dials."""
    swarm_key: bytes | None = field(default=None, repr=False)
    """Of a private swarm: whoever does not know it is refused, dialling and dialled."""

    def listener_identity(self) -> Identity:
        """Raises BadRequest for an end that only dials."""
        if self.identity is None:
            raise BadRequest("listening with TLS needs an identity: give one, such as Identity.ephemeral()")
        return self.identity

    def proof(self, role: Role, server_pin: str) -> tuple[tuple[str, str], ...]:
        """Call metadata.  Bound to the server's own key: one heard in the middle fits nobody else's."""
        if self.swarm_key is None:
            return ()
        return ((PROOF_KEY, hmac.new(self.swarm_key, f"{role}|{server_pin}".encode(), hashlib.sha256).hexdigest()),)

    def proves_key(self, role: Role, server_pin: str, metadata: dict[str, str | bytes]) -> bool:
        """Whether the other end, in that role, knows the key; True where there is none to know."""
        return all(
            hmac.compare_digest(expected.encode(), _as_bytes(metadata.get(name, b"")))
            for name, expected in self.proof(role, server_pin)
        )

    def check_dialler(self, metadata: dict[str, str | bytes]) -> None:
        """Raises Refused for one outside this private swarm."""
        if not self.proves_key(Role.DIALLER, self.listener_identity().pin, metadata):
            theirs = (
                "another swarm key, or took another machine for this node" if PROOF_KEY in metadata else "no swarm key"
            )
            raise Refused(
                f"this is a private swarm, and the caller has {theirs}: start with --swarm-key PATH, "
                "the key file that the swarm's members share",
                FaultCode.WRONG_SWARM_KEY,
            )

    def check_acceptor(self, target: str, server_pin: str, metadata: dict[str, str | bytes]) -> None:
        """Raises Refused for a node outside this private swarm."""
        if not self.proves_key(Role.ACCEPTOR, server_pin, metadata):
            raise Refused(
                f"{target} does not know this private swarm's key: start it with the same --swarm-key PATH, or leave "
                "--swarm-key out here to use an open swarm; nothing was sent to it",
                FaultCode.WRONG_SWARM_KEY,
            )


def unreachable(target: str, why: str) -> Unreachable:
    """Nobody answers, and what to do."""
    return Unreachable(
        f"nobody answers at {target} ({why}): check the address, that the node runs, and any firewall between"
    )


def check_pin(address: Address, certificate: Certificate) -> None:
    """Raises Impostor."""
    if address.pin and address.pin != certificate.pin:
        raise Impostor(
            f"{address.bare} answered with the key {certificate.pin} instead of {address.pin}: a machine in the middle "
            "may be there, or the node was set up anew; ask its owner for its address with #pin, nothing was sent"
        )


async def fetch_certificate(address: Address, within_s: float) -> Certificate:
    """What the server at an address shows, whoever it is.  Raises Unreachable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only its pin can say whether it is the right one
    context.set_alpn_protocols([GRPC_PROTOCOL])
    try:
        async with asyncio.timeout(within_s):
            _, writer = await asyncio.open_connection(
                address.host, address.port, ssl=context, server_hostname=SERVER_NAME
            )
    except TimeoutError:
        raise unreachable(address.bare, "no answer in time") from None
    except ssl.SSLError as error:
        raise _stranger(address, error.reason or str(error)) from None
    except OSError as error:
        raise unreachable(address.bare, error.strerror or str(error)) from None
    try:
        shown: ssl.SSLObject = writer.get_extra_info("ssl_object")
        der = shown.getpeercert(binary_form=True)
        if der is None or shown.selected_alpn_protocol() != GRPC_PROTOCOL:
            raise _stranger(address, "its TLS is for another protocol")
        return Certificate(ssl.DER_cert_to_PEM_cert(der).encode(), pin_of(der))
    except ValueError as error:
        raise _stranger(address, str(error)) from None
    finally:
        writer.transport.abort()  # a goodbye would wait for the other end's


def _stranger(address: Address, why: str) -> Unreachable:
    return Unreachable(
        f"what answers at {address.bare} does not speak as a swarm-node does ({why}): check the port, and that "
        "the node there is of this release"
    )


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
