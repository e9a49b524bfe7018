"""Refuse what speaks another version of the protocol."""

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import Refused
from treeswarm.protocol.messages import FaultCode


def check_version(sender: str, version: int) -> None:
    """Raise Refused if a request that this node received is of another version; `sender` begins the sentence."""
    if version != PROTOCOL_VERSION:
        raise Refused(
            f"{sender} uses protocol {version}, this node protocol {PROTOCOL_VERSION}: "
            "install the same release on both",
            FaultCode.WRONG_VERSION,
        )
