"""Orders to the nodes of this machine reach those that run, and name those that do not run any more."""

from pathlib import Path

import pytest

from treeswarm.errors import NodeLost
from treeswarm.keys import Identity
from treeswarm.protocol.node_messages import Manage, Managed
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm.transport.tls import Security
from treeswarm_node.cli.owner_commands import run_owner_command
from treeswarm_node.membership.identity_file import claim_identity, record_running


async def accept(kind: StreamKind, stream: Stream) -> None:
    order = await stream.receive()
    assert isinstance(order, Manage)
    await stream.send(Managed(f"does {order.action}"))
    await stream.receive()


async def test_a_port_that_another_node_has_now_is_no_machine_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a node was killed, another one may have its port; without locks its file still says that it runs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with claim_identity() as (mine, path), claim_identity() as (_, gone):
        transport = GrpcTransport(security=Security(mine))
        listener = await transport.listen("127.0.0.1:0", accept)
        try:
            with (
                record_running(path, f"{listener.address}#{mine.pin}"),
                record_running(gone, f"{listener.address}#{Identity.ephemeral().pin}"),
            ):
                assert await run_owner_command(["pause"]) == 1
                with pytest.raises(NodeLost, match="does not run any more: another one has its port"):
                    await run_owner_command(["pause", "--identity", str(gone)])
        finally:
            await listener.close()
            await transport.close()
    shown = capsys.readouterr()
    assert shown.out == f"{listener.address}#{mine.pin}: does pause\n"
    assert "does not run any more" in shown.err
    assert "machine in the middle" not in shown.err
