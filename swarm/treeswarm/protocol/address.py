"""Addresses, parsed and checked once: `host:port`, or `host:port#pin` with the pin of the key that must answer."""

import ipaddress
import re
from dataclasses import dataclass

from treeswarm.errors import BadRequest

# Join codes carry so many of a pin's 32 digits: finding another key with the same 80 bits takes 2^80 tries.
SHORT_PIN_DIGITS = 20
PIN = re.compile(rf"[0-9a-f]{{32}}|[0-9a-f]{{{SHORT_PIN_DIGITS}}}")


def without_pin(address: str) -> str:
    """Return the text of an address up to its pin, if it has one.  Nothing is checked."""
    return address.partition("#")[0]


@dataclass(frozen=True)
class Address:
    """Where a node listens.  In text an IPv6 host stands in brackets: `[::1]:4001`."""

    host: str
    port: int
    pin: str = ""
    """Pin of the TLS key that must answer, made by `treeswarm.keys`, or its first digits; empty to accept any key."""

    @property
    def bare(self) -> str:
        """The address without the pin."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.bare}#{self.pin}" if self.pin else self.bare

    def admits(self, pin: str) -> bool:
        """Return whether the key with this pin may answer at the address."""
        return pin.startswith(self.pin)

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read `HOST:PORT` or `HOST:PORT#PIN`.  Raises BadRequest for anything else."""
        address, sharp, pin = text.partition("#")
        if sharp and PIN.fullmatch(pin) is None:
            raise BadRequest(
                f"'{text}' is not an address: after # give the pin of the node's key, 32 lowercase hex digits as in "
                "the node's ready line, or leave #… out to accept any key"
            )
        host, colon, port = address.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not (colon and bare and port.isdecimal() and int(port) < 2**16) or (":" in bare and bare == host):
            raise BadRequest(f"'{text}' is not an address: give HOST:PORT, such as 127.0.0.1:4001 or [::1]:4001")
        return cls(bare, int(port), pin)


def is_loopback(host: str) -> bool:
    """Return whether `host` names this machine itself, so that no other machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(peer: str) -> str:
    """Return the host of a peer's `host:port`, or the whole text if it has no port."""
    return peer.rpartition(":")[0] or peer


def port_of(peer: str) -> int:
    """Return the port of a peer's `host:port`, or 0 if it has none."""
    port = peer.rpartition(":")[2]
    return int(port) if port.isdecimal() else 0
