"""`host:port`, and who is to be found there: `host:port#pin`; read and checked once."""

import ipaddress
import re
from dataclasses import dataclass

from treeswarm.errors import BadRequest

PIN = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Address:
    """An IPv6 host is written in brackets: `[::1]:4001`."""

    host: str
    port: int
    pin: str = ""
    """What `treeswarm.keys` makes of the TLS key that must answer; empty: whoever answers."""

    @property
    def bare(self) -> str:
        """Without the pin."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.bare}#{self.pin}" if self.pin else self.bare

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises BadRequest."""
        place, sharp, pin = text.partition("#")
        if sharp and PIN.fullmatch(pin) is None:
            raise BadRequest(
                f"'{text}' is no address: after # belongs the pin of the node's key, 32 lowercase hex digits, "
                "as the node's ready line shows it; leave #… out to trust whoever answers"
            )
        host, colon, port = place.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not (colon and bare and port.isdecimal() and int(port) < 2**16) or (":" in bare and bare == host):
            raise BadRequest(f"'{text}' is no address: give HOST:PORT, such as 127.0.0.1:4001 or [::1]:4001")
        return cls(bare, int(port), pin)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
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
