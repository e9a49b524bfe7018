"""A registry that is a list of addresses a user typed."""

from dataclasses import dataclass

from treeswarm.errors import BadRequest
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.registry.seam import NodeRecord
from treeswarm.transport.address import Address


@dataclass(eq=False)
class StaticRegistry(MemoryRegistry):
    """Starts with `addresses`; what is announced besides stays in this process."""

    addresses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._records.update({address: NodeRecord(address) for address in self.addresses})

    @classmethod
    def parse(cls, text: str) -> "StaticRegistry":
        """Read `H:P,H:P`.  Raises BadRequest naming what is no address."""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise BadRequest("no node is named: give --peers HOST:PORT,HOST:PORT")
        return cls(addresses=tuple(dict.fromkeys(str(Address.parse(part)) for part in parts)))
