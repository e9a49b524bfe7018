"""The owner's word to nodes that run on this machine: `swarm-node pause`, `resume`, `drain`."""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

from treeswarm.errors import BadRequest, Malformed, NodeLost
from treeswarm.keys import Identity, read_swarm_key
from treeswarm.protocol.messages import Manage, Managed
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import StreamKind, Transport
from treeswarm.transport.tls import Security
from treeswarm_node.membership.announcer import order_bytes
from treeswarm_node.membership.identity_file import default_identity_folder, running_file

COMMANDS = ("pause", "resume", "drain")
ANSWER_S = 10.0
EXAMPLES = """examples:
  swarm-node pause                          all nodes of yours on this machine: sessions move elsewhere, memory is freed
  swarm-node resume                         they load and serve again
  swarm-node drain --identity ./a.pem       one node leaves for good"""


async def command(arguments: Sequence[str]) -> int:
    """Give the order; exit status 0.  Raises BadRequest, and what a node answers instead of obeying."""
    made = argparse.ArgumentParser(
        prog="swarm-node", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("action", choices=COMMANDS)
    made.add_argument("--identity", type=Path, metavar="PATH", help="of the node meant (default: all of yours here)")
    made.add_argument("--swarm-key", type=Path, metavar="PATH", help="key file of its private swarm")
    args = made.parse_args(arguments)
    kept = [args.identity] if args.identity else sorted(default_identity_folder().glob("*.pem"))
    running = [path for path in kept if running_file(path).exists()]
    if not running:
        raise BadRequest("no node of yours runs here: name its identity file with --identity PATH")
    transport = GrpcTransport(security=Security(swarm_key=read_swarm_key(args.swarm_key) if args.swarm_key else None))
    try:
        for path in running:
            address = json.loads(running_file(path).read_text("utf-8"))["address"]
            print(f"{address}: {await _tell(transport, address, Identity.load_or_create(path), args.action)}")
    finally:
        await transport.close()
    return 0


async def _tell(transport: Transport, address: str, identity: Identity, action: str) -> str:
    stream = await transport.connect(address, StreamKind.CONTROL)
    stamp = int(time.time() * 1e6)
    try:
        await stream.send(Manage(action, stamp, identity.sign(order_bytes(action, stamp))))
        answer = await asyncio.wait_for(stream.receive(), ANSWER_S)
    except TimeoutError:
        raise NodeLost(f"{address} does not answer: is the node still running?", address) from None
    finally:
        await stream.end()
    if not isinstance(answer, Managed):
        raise Malformed(f"{address} did not answer an order: is it a swarm-node of this release?")
    return answer.message
