"""A client reports a lost only holder to the node that would take its blocks over, and to no other."""

import asyncio
from dataclasses import replace

from treeswarm.protocol.messages import ReportLost
from treeswarm.protocol.records import SealedRecord
from treeswarm.protocol.spans import Span
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.discovery.lost_reports import AGAIN_S, LostReporter


def reports_after(*spans: tuple[int, int], lost: int, times: int = 1) -> list[tuple[int, tuple[str, ...]]]:
    """Return the reports that nodes of these spans receive once the node `lost` was lost: (index of receiver, ids)."""

    async def run() -> list[tuple[int, tuple[str, ...]]]:
        network, received, records = MemoryNetwork(), list[tuple[int, tuple[str, ...]]](), list[SealedRecord]()
        for number, span in enumerate(spans):

            async def accept(kind: StreamKind, stream: Stream, number: int = number) -> None:
                message = await stream.receive()
                assert isinstance(message, ReportLost)
                received.append((number, message.nodes))

            await network.transport().listen(f"127.0.0.1:{4000 + number}", accept)
            sealed = FakeNode().record(4000 + number, span=Span(*span))
            records.append(SealedRecord(replace(sealed.record, pin=""), b""))
        reporter = LostReporter(network.transport(), lambda: tuple(records), MODEL, 8)
        for _ in range(times):
            reporter.report(records[lost].record.node)
            await asyncio.sleep(AGAIN_S / 4)
        await reporter.close()
        assert all(nodes == (records[lost].record.node,) for _, nodes in received)
        return received

    return run_virtually(run())


def test_the_spares_are_told_of_a_lost_only_holder() -> None:
    receivers = [number for number, _ in reports_after((0, 4), (4, 8), (4, 8), lost=0)]
    assert sorted(receivers) == [1, 2], "the one that acts first, and the one that follows if it cannot"


def test_no_node_is_told_of_a_holder_with_a_replica() -> None:
    assert reports_after((0, 4), (0, 4), (4, 8), (4, 8), lost=0) == []


def test_a_lost_node_is_not_reported_again_at_once() -> None:
    assert len(reports_after((0, 4), (4, 8), (4, 8), lost=0, times=4)) == 2
    assert len(reports_after((0, 4), (4, 8), (4, 8), lost=0, times=5)) == 4
