"""Messages of control streams about the node itself: its address, its owner, its swarm, and no session."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FindSwarm:
    """Ask a node for the registry of its swarm, to join there."""

    version: int


@dataclass(frozen=True)
class SwarmFound:
    """Tell a node that is about to join where the nodes of the swarm announce themselves."""

    registry: str
    """Value of `--registry` that names the registry, without credentials, or "" if the node uses none."""


@dataclass(frozen=True)
class DialBack:
    """Ask a node to dial `address`, so that the sender learns whether other machines reach it."""

    address: str
    """The sender's own address; the host 0.0.0.0 or [::] stands for the one that the connection comes from."""


@dataclass(frozen=True)
class DialledBack:
    """The result of a DialBack."""

    reached: bool
    why: str
    """The address that was dialled, or the reason why it was not reached."""


@dataclass(frozen=True)
class Manage:
    """An order of the node's owner, signed by the node's own identity."""

    action: str
    """`pause`, `resume` or `drain`."""
    stamp: int
    """Microseconds since 1970 when the order was given."""
    signature: bytes


@dataclass(frozen=True)
class Managed:
    """Confirm an owner's order."""

    message: str
    """A sentence for the owner."""


@dataclass(frozen=True)
class LeasePort:
    """Ask a node for a lease of a port that other machines can dial, in place of the sender's own."""

    version: int


# ---------------------------------------------------------------- control, node to client


@dataclass(frozen=True)
class PortLeased:
    """Other machines dial `port`; the borrower fetches each of their connections at `fetch_port`, by its token."""

    port: int
    fetch_port: int


@dataclass(frozen=True)
class IncomingConnection:
    """Tell the borrower that a machine has dialled the leased port."""

    token: bytes


# ---------------------------------------------------------------- link
