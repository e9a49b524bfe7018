"""Ask nodes what they serve and how busy they are."""

import asyncio
import logging
from collections.abc import Sequence

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import Malformed, NodeLost, Refused, TransportError
from treeswarm.protocol.messages import Describe, Description, FaultCode
from treeswarm.transport.seam import StreamKind, Transport

log = logging.getLogger(__name__)

ANSWER_S = 10.0


async def describe(transport: Transport, address: str) -> Description:
    """Return the description of one node.  Raises Unreachable, LinkBroken, Refused, Malformed or NodeLost."""
    stream = await transport.connect(address, StreamKind.CONTROL)
    try:
        await stream.send(Describe(PROTOCOL_VERSION))
        answer = await asyncio.wait_for(stream.receive(), ANSWER_S)
    except TimeoutError:
        raise NodeLost(f"{address} accepted the connection, then sent nothing for {ANSWER_S:.0f} s", address) from None
    finally:
        await stream.end()
    if not isinstance(answer, Description):
        raise Malformed(f"{address} did not describe itself: check that a swarm-node listens there")
    if answer.version != PROTOCOL_VERSION:
        raise Refused(
            f"{address} uses protocol {answer.version} ({answer.software}), this client protocol {PROTOCOL_VERSION}: "
            "install the same release on both",
            FaultCode.WRONG_VERSION,
        )
    return answer


async def describe_all(transport: Transport, addresses: Sequence[str]) -> dict[str, Description]:
    """Ask all nodes at once, and return their descriptions by address.

    Nodes that do not answer are left out, with a warning in the log.  Raises the error of the first if none answers.
    """
    answers = await asyncio.gather(*(describe(transport, address) for address in addresses), return_exceptions=True)
    silent = [answer for answer in answers if isinstance(answer, TransportError | NodeLost)]
    for answer in answers:
        if isinstance(answer, BaseException) and (answer not in silent or len(silent) == len(answers)):
            raise answer
    for answer in silent:
        log.warning("%s", answer)
    named = zip(addresses, answers, strict=True)
    return {address: answer for address, answer in named if isinstance(answer, Description)}
