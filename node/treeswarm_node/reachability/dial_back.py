"""Dial other nodes at their own request, so that they learn whether other machines reach them."""

import asyncio
import contextlib
from collections.abc import Set
from dataclasses import dataclass, replace

from treeswarm.errors import Refused, SwarmError
from treeswarm.protocol.address import Address, host_of, port_of
from treeswarm.protocol.messages import FaultCode
from treeswarm.protocol.node_messages import DialledBack
from treeswarm.transport.seam import StreamKind, Transport

# Wildcard hosts.  In a request they stand for the host from which the requesting node's connection comes.
ANY_HOST = ("0.0.0.0", "::")


@dataclass(frozen=True, eq=False)
class DialBackResponder:
    """Dials nodes back, at their own addresses only."""

    transport: Transport
    forwarded_ports: Set[int]
    """Local ports of the connections that come through a leased port of this node."""

    def check_direct(self, peer: str) -> None:
        """Raise Refused for a peer that comes through a leased port.

        Such a peer has this machine's own address, and could have this machine's ports dialled.
        """
        if port_of(peer) in self.forwarded_ports:
            raise Refused("your address cannot be seen from here: ask another node", FaultCode.REFUSED)

    async def dial(self, requested: str, peer: str) -> DialledBack:
        """Dial the `requested` address for the node at `peer` and return the reply to it."""
        try:
            address = await _own_address(Address.parse(requested), peer)
            stream = await self.transport.connect(str(address), StreamKind.CONTROL)
            await stream.end()
        except SwarmError as error:
            return DialledBack(False, str(error))
        return DialledBack(True, address.bare)


async def _own_address(address: Address, peer: str) -> Address:
    """Return the address, with the peer's host in place of a wildcard.

    Raises Refused if it is not the peer's own: otherwise other machines could use this node as a port scanner.
    """
    host = host_of(peer).strip("[]")
    if address.host in ANY_HOST:
        return replace(address, host=host)
    with contextlib.suppress(OSError):
        entries = await asyncio.get_running_loop().getaddrinfo(address.host, address.port)
        if any(str(entry[4][0]) == host for entry in entries):
            return address
    raise Refused(f"{address} is not the address you come from ({host})", FaultCode.REFUSED)
