"""Parser of `--registry` and `--peers`.  Pure: it turns text into data, or raises BadRequest."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from treeswarm.errors import BadRequest
from treeswarm.keys import key_marker
from treeswarm.protocol.address import Address
from treeswarm.protocol.join_code import JoinCode, is_join_code

Kind = Literal["dht", "mqtt", "static", "peers", "none"]

MADDR = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/[^/,\s]+/tcp/\d{1,5}/p2p/[1-9A-HJ-NP-Za-km-z]{30,70}")
MADDR_EXAMPLE = "/ip4/203.0.113.7/tcp/4002/p2p/12D3KooW…"
# Characters that every broker and every MQTT tool accepts in a topic level; `+`, `#` and `$` have other meanings there.
LEVEL = re.compile(r"[A-Za-z0-9._-]+")
MAX_NAMESPACE = 128
PLACEHOLDERS = "USER:PASSWORD@"
EXAMPLES = (
    "a join code such as 'swarm:10.0.0.1:4001/7k3m-9qxt-…', "
    "'dht:' (the first node of a swarm), "
    f"'dht:{MADDR_EXAMPLE}' (join one), "
    "'mqtts://user:password@broker.example.org/swarm', "
    "'10.0.0.1:4001,10.0.0.2:4001' (these nodes and all that they know), "
    "'static:10.0.0.1:4001' (exactly these) or 'none'"
)


def redacted(spec: str) -> str:
    """Return a spec for messages and logs, with a placeholder for what may be user and password.

    The spec may be malformed in any way.
    """
    before, at, after = spec.rpartition("@")
    scheme = re.match(r"(mqtts?|dht|static):/*", before)
    return f"{scheme[0] if scheme else ''}{PLACEHOLDERS}{after}" if at else spec


def registry_kind(spec: str) -> Kind:
    """Return the kind of registry that a spec names.  Details are checked when it is opened.

    Raises BadRequest with examples.
    """
    scheme, colon, _ = spec.partition(":")
    if is_join_code(spec):
        return "peers"
    if spec == "none":
        return "none"
    if colon and scheme in ("mqtt", "mqtts") and spec.startswith(f"{scheme}://"):
        return "mqtt"
    if colon and scheme in ("dht", "static"):
        return "dht" if scheme == "dht" else "static"
    try:
        parse_addresses(spec)
    except BadRequest:
        raise BadRequest(f"'{redacted(spec)}' names no registry: give {EXAMPLES}") from None
    return "peers"


def parse_addresses(text: str) -> tuple[str, ...]:
    """Read the addresses in `H:P,H:P`, without duplicates; a join code stands for the address of its node.

    Raises BadRequest that names a malformed address.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise BadRequest("no node is named: give --peers HOST:PORT,HOST:PORT")
    return tuple(dict.fromkeys(str(_address(part)) for part in parts))


def check_swarm_key(spec: str, swarm_key: bytes | None) -> None:
    """Compare the key given with the key markers of the join codes in a spec.  Raises BadRequest where they differ."""
    marker = key_marker(swarm_key)
    for code in (JoinCode.parse(part) for part in spec.removeprefix("static:").split(",") if is_join_code(part)):
        if code.key_marker == marker:
            continue
        if not marker:
            raise BadRequest(
                f"{code.address.bare} belongs to a private swarm, and no key is given: ask the person who gave you the "
                "join code for the swarm's key file, and add --swarm-key PATH (the code itself never holds the key)"
            )
        if not code.key_marker:
            raise BadRequest(
                f"{code.address.bare} belongs to an open swarm, and a swarm key is given: leave --swarm-key out, or "
                "give the join code of the private swarm"
            )
        raise BadRequest(
            f"the swarm key is not the one of {code.address.bare}: ask the person who gave you the join code for the "
            "swarm's key file (`sha256sum FILE` shows whether two files are the same)"
        )


def _address(text: str) -> Address:
    return JoinCode.parse(text).address if is_join_code(text) else Address.parse(text)


def parse_dht_peers(spec: str) -> tuple[str, ...]:
    """Return the multiaddresses after `dht:`; none for the first node of a new swarm.  Raises BadRequest."""
    parts = [part.strip() for part in spec.removeprefix("dht:").split(",") if part.strip()]
    for part in parts:
        if not MADDR.fullmatch(part):
            raise BadRequest(f"'{part}' is no address in a DHT: give what a node prints, such as dht:{MADDR_EXAMPLE}")
    return tuple(dict.fromkeys(parts))


@dataclass(frozen=True)
class Broker:
    """Address of an MQTT broker, and how to log in there."""

    host: str
    port: int
    namespace: str
    """Topic levels that all topics of the swarm begin with."""
    tls: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: Path | None = None
    """PEM file of the certificates to trust, or None for the system's."""

    def __str__(self) -> str:
        """Return the address for messages and logs, without the password."""
        return f"{'mqtts' if self.tls else 'mqtt'}://{Address(self.host, self.port)}/{self.namespace}"

    @classmethod
    def parse(cls, spec: str) -> "Broker":
        """Read `mqtt[s]://[user:pass@]host[:port]/namespace[?ca=/path.pem]`.  Raises BadRequest."""
        try:
            url = urlsplit(spec)
            host, port = url.hostname, url.port
        except ValueError:  # Its text is dropped, because it quotes what may be part of a password.
            raise BadRequest(
                f"'{redacted(spec)}' is no address of a broker: after HOST: comes a port, 1 to 65535, and in a "
                "password '/', '?', '#', '[' and ']' are written %2F, %3F, %23, %5B and %5D"
            ) from None
        if url.scheme not in ("mqtt", "mqtts") or not host:
            raise BadRequest(
                f"'{redacted(spec)}' names no broker: "
                "give mqtt://HOST[:PORT]/NAMESPACE, with TLS mqtts://USER:PASSWORD@HOST/NAMESPACE"
            )
        tls = url.scheme == "mqtts"
        return cls(
            host=host,
            port=port or (8883 if tls else 1883),
            namespace=_namespace(url.path, host),
            tls=tls,
            user=unquote(url.username) if url.username else None,
            password=unquote(url.password) if url.password else None,
            ca=_ca(url, tls),
        )


def shareable_spec(spec: str) -> str:
    """Return a broker's spec, which must be valid, for others to join with: with placeholders for the credentials.

    Every user of a broker has a name and a password of their own.
    """
    url = urlsplit(spec)
    _, at, location = url.netloc.rpartition("@")
    return url._replace(netloc=f"{PLACEHOLDERS}{location}" if at else location).geturl()


def _namespace(path: str, host: str) -> str:
    namespace = path.strip("/")
    if not namespace:
        raise BadRequest(
            f"the broker's address has no namespace: give mqtt://{host}/NAMESPACE, the same for all nodes of the swarm"
        )
    if len(namespace) > MAX_NAMESPACE or not all(LEVEL.fullmatch(level) for level in namespace.split("/")):
        raise BadRequest(
            f"'{redacted(namespace)}' is no namespace: letters, digits, '.', '_', '-', levels between single "
            f"'/', at most {MAX_NAMESPACE} characters, no wildcards"
        )
    return namespace


def _ca(url: SplitResult, tls: bool) -> Path | None:
    query = parse_qs(url.query, keep_blank_values=True)
    if unknown := set(query) - {"ca"}:
        raise BadRequest(
            f"'{', '.join(sorted(unknown))}' has no meaning in a broker's address: only ?ca=/path.pem is allowed"
        )
    if "ca" not in query:
        return None
    path = Path(query["ca"][0])
    if not tls:
        raise BadRequest("?ca=… needs TLS: write mqtts://, or leave it out")
    if not path.is_file():
        raise BadRequest(f"{path} is no file: ?ca= takes a PEM file with the broker's certificate authority")
    return path
