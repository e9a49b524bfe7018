"""Who is out there: one seam, and the forms it takes."""

from treeswarm.errors import BadRequest
from treeswarm.registry.peers import PeersRegistry
from treeswarm.transport.address import Address
from treeswarm.transport.seam import Transport


def addresses_of(text: str) -> tuple[str, ...]:
    """Read `H:P,H:P`.  Raises BadRequest naming what is no address."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise BadRequest("no node is named: give --peers HOST:PORT,HOST:PORT")
    return tuple(dict.fromkeys(str(Address.parse(part)) for part in parts))


def peers_registry(spec: str, transport: Transport, model: str | None) -> PeersRegistry:
    """`static:H:P,H:P` (exactly these nodes) or `H:P,H:P` (these, and whoever they know).  Raises BadRequest."""
    listed = spec.removeprefix("static:")
    return PeersRegistry(model, transport=transport, addresses=addresses_of(listed), everyone=listed == spec)
