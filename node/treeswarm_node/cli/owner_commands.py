"""The owner's orders to nodes that run on this machine: `swarm-node pause`, `resume`, `drain`."""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from treeswarm.errors import BadRequest, Impostor, Malformed, NodeLost, SwarmError, Unreachable
from treeswarm.keys import Identity, read_swarm_key
from treeswarm.protocol.node_messages import Manage, Managed
from treeswarm.transport.seam import StreamKind, Transport
from treeswarm.transport.tls import Security
from treeswarm_node.membership.announcer import order_bytes
from treeswarm_node.membership.identity_file import default_identity_folder, running_address

COMMANDS = ("pause", "resume", "drain")
ANSWER_S = 10.0
EXAMPLES = """examples:
  swarm-node pause                          pause all your nodes on this machine: their sessions move to other nodes,
                                            and their memory is freed
  swarm-node resume                         load the models again and serve
  swarm-node drain --identity ./a.pem       let one node leave the swarm for good"""


async def run_owner_command(arguments: Sequence[str]) -> int:
    """Give the order to the nodes meant; return exit status 0, or 1 if one of several did not take it.

    Raises BadRequest if no node runs here, NodeLost if the only one does not answer, and any error it replies with.
    """
    parser = argparse.ArgumentParser(
        prog="swarm-node", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=COMMANDS)
    parser.add_argument(
        "--identity", type=Path, metavar="PATH", help="identity file of the node (default: all your nodes here)"
    )
    parser.add_argument("--swarm-key", type=Path, metavar="PATH", help="key file of the node's private swarm")
    args = parser.parse_args(arguments)
    identities = [args.identity] if args.identity else sorted(default_identity_folder().glob("*.pem"))
    running = {path: address for path in identities if (address := running_address(path)) is not None}
    if not running:
        raise BadRequest("no node of yours runs here: give its identity file with --identity PATH")
    # Imported here, so that a wrong command line is refused before gRPC is loaded.
    from treeswarm.transport.grpc import GrpcTransport  # noqa: PLC0415

    transport = GrpcTransport(security=Security(swarm_key=read_swarm_key(args.swarm_key) if args.swarm_key else None))
    try:
        status = 0
        for path, address in running.items():
            try:
                print(f"{address}: {await _give_order(transport, address, Identity.load_or_create(path), args.action)}")
            except SwarmError as error:  # the other nodes get the order all the same
                if len(running) == 1:
                    raise
                print(f"swarm-node: {error}", file=sys.stderr)
                status = 1
    finally:
        await transport.close()
    return status


async def _give_order(transport: Transport, address: str, identity: Identity, action: str) -> str:
    try:
        stream = await transport.connect(address, StreamKind.CONTROL)
    except (Impostor, Unreachable) as error:  # possible where locks do not exist, and while a node starts or ends
        reason = "another one has its port" if isinstance(error, Impostor) else "nothing answers there"
        raise NodeLost(f"the node at {address} does not run any more: {reason}", address) from None
    stamp = int(time.time() * 1e6)
    try:
        await stream.send(Manage(action, stamp, identity.sign(order_bytes(action, stamp))))
        reply = await asyncio.wait_for(stream.receive(), ANSWER_S)
    except TimeoutError:
        raise NodeLost(f"{address} does not answer: is the node still running?", address) from None
    finally:
        await stream.end()
    if not isinstance(reply, Managed):
        raise Malformed(f"{address} did not acknowledge the order: is it a swarm-node of this release?")
    return reply.message
