"""`host:port`, read and checked once."""

from dataclasses import dataclass

from treeswarm.errors import BadRequest


@dataclass(frozen=True)
class Address:
    """An IPv6 host is written in brackets: `[::1]:4001`."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises BadRequest."""
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not (colon and bare and port.isdecimal() and int(port) < 2**16) or (":" in bare and bare == host):
            raise BadRequest(f"'{text}' is no address: give HOST:PORT, such as 127.0.0.1:4001 or [::1]:4001")
        return cls(bare, int(port))
