"""Signed records survive sealing unchanged, altered ones are refused, and the newest counts whatever the order."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm.errors import BadRequest, Malformed
from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.protocol.messages import MAX_RECORD_BYTES, NumericsClass
from treeswarm.protocol.records import NodeRecord, NodeState, SealedRecord
from treeswarm.protocol.spans import Span
from treeswarm.registry.book import RecordBook
from treeswarm.topology.coordinates import Coordinate
from treeswarm.wire import treeswarm_pb2 as pb
from treeswarm.wire.sealing import RECORD_PREFIX, Forged, seal, unseal
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode

NODES = [FakeNode() for _ in range(4)]
floats = st.floats(0.0625, 1, width=32)


@st.composite
def records(draw: st.DrawFn) -> tuple[FakeNode, NodeRecord]:
    node = draw(st.sampled_from(NODES))
    start = draw(st.integers(0, 100))
    changes = {
        "generation": draw(st.integers(0, 2**63)),
        "expires": draw(st.integers(0, 2**40)),
        "state": draw(st.sampled_from(NodeState)),
        "address": f"host-{draw(st.integers(0, 9))}.example:{draw(st.integers(0, 65535))}",
        "pin": draw(st.sampled_from(["", "0f" * 16])),
        "reachable": draw(st.booleans()),
        "name": draw(st.text(max_size=20)),
        "span": Span(start, start + draw(st.integers(1, 20))),
        "blocks": 200,
        "free_tokens": draw(st.integers(0, 2**32 - 1)),
        "speculator": draw(st.sampled_from(["", "autoregressive"])),
        "agreement": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "tap_head": (head := draw(st.sampled_from(["", "0123456789abcdef"]))),
        "taps": tuple(sorted(draw(st.sets(st.integers(0, 199), min_size=1, max_size=16)))) if head else (),
        "rules": draw(st.integers(0, 2)),
        "grammar": draw(st.sampled_from(["", "llguidance 1.3.0"])),
        "coordinate": tuple(draw(st.lists(floats, max_size=6))),
    }
    return node, replace(node.record().record, **changes)


@given(records())
def test_a_sealed_record_is_unsealed_unchanged(signed: tuple[FakeNode, NodeRecord]) -> None:
    node, record = signed
    sealed = seal(record, node)
    assert len(sealed.sealed) <= MAX_RECORD_BYTES
    assert unseal(sealed.sealed) == sealed
    assert unseal(sealed.sealed).record.node == node.id


@given(st.integers(0), st.integers(1, 255))
def test_a_record_with_a_changed_byte_is_malformed(position: int, flip: int) -> None:
    sealed = bytearray(NODES[0].record().sealed)
    sealed[position % len(sealed)] ^= flip
    with pytest.raises(Malformed):
        unseal(bytes(sealed))


@given(st.binary(max_size=2 * MAX_RECORD_BYTES))
def test_any_other_bytes_are_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        unseal(data)


def test_a_signature_of_another_node_is_forged() -> None:
    a, b = NODES[:2]
    record, signature = a.record(), b.record().sealed[-64:]
    with pytest.raises(Forged):
        unseal(record.sealed[:-64] + signature)


def test_a_record_too_large_is_not_sealed() -> None:
    with pytest.raises(BadRequest, match="use a shorter address or model name"):
        NODES[0].record(name="x" * 600)


@pytest.mark.parametrize(
    ("coordinate", "position"),
    [
        ((), None),
        ((0.1, 0.2, 0.01), None),
        ((0.1, 0.2, 0.01, 0.5), Coordinate(0.1, 0.2, 0.01, 0.5)),
        ((1.0,) * 6, None),
    ],
)
def test_a_position_needs_all_numbers_of_a_coordinate(
    coordinate: tuple[float, ...], position: Coordinate | None
) -> None:
    record: NodeRecord = NODES[0].record(coordinate=coordinate).record
    assert record.position == position


def largest_record(**changes: Any) -> SealedRecord:
    """Return a record whose fields are as long as they become in use."""
    fields: dict[str, Any] = {
        "address": "some-machine.of-a-volunteer.example.org:65535",
        "name": "organisation/Some-Model-With-A-Long-Name-Instruct-2511-GGUF-Q4KM",
        "numerics": NumericsClass("ab" * 32, "bfloat16", "published", "int8"),
        "coordinate": (0.123, 0.456, 0.012, 0.5),
        "free_tokens": 2**40,
        "total_tokens": 2**40,
        "software": "treeswarm 0.10.10",
    }
    return NODES[0].record(**fields | changes)


@pytest.mark.parametrize("kind", list(DriverKind))
def test_a_record_says_whether_its_node_drives(kind: DriverKind) -> None:
    sealed = largest_record(driver=kind)
    assert len(sealed.sealed) <= MAX_RECORD_BYTES
    assert unseal(sealed.sealed).record.driver is kind


def test_a_record_with_the_most_taps_can_be_passed_on() -> None:
    taps = tuple(range(184, 200))
    changes = {"span": Span(150, 200), "blocks": 200, "driver": DriverKind.MODEL, "speculator": "autoregressive"}
    sealed = largest_record(tap_head="ab" * 8, taps=taps, **changes)
    assert len(sealed.sealed) <= MAX_RECORD_BYTES
    assert unseal(sealed.sealed).record.taps == taps


@pytest.mark.parametrize(
    ("head", "taps", "problem"),
    [
        (bytes(8), [], "must come together"),
        (b"", [1], "must come together"),
        (bytes(7), [1], "tap_head is no digest"),
        (bytes(8), [2, 1], "taps do not rise"),
        (bytes(8), range(17), "taps do not rise"),
        (bytes(8), [8], "a tap is outside the model"),
    ],
)
def test_a_head_without_possible_taps_is_malformed(head: bytes, taps: Sequence[int], problem: str) -> None:
    node = NODES[0]
    envelope = pb.SealedRecord.FromString(node.record().sealed)
    body = pb.NodeRecord.FromString(envelope.record)
    body.tap_head = head
    body.taps.extend(taps)
    envelope.record = body.SerializeToString()
    envelope.signature = node.sign(RECORD_PREFIX + envelope.record)
    with pytest.raises(Malformed, match=problem):
        unseal(envelope.SerializeToString())


def test_a_kind_of_driver_of_a_later_release_drives() -> None:
    node = NODES[0]
    envelope = pb.SealedRecord.FromString(node.record(driver=DriverKind.MODEL).sealed)
    body = pb.NodeRecord.FromString(envelope.record)
    body.driver = 7
    envelope.record = body.SerializeToString()
    envelope.signature = node.sign(RECORD_PREFIX + envelope.record)
    assert unseal(envelope.SerializeToString()).record.driver is DriverKind.MODEL


@st.composite
def histories(draw: st.DrawFn) -> list[SealedRecord]:
    """Draw some records of some nodes, each of them once or several times, in any order."""
    records = [
        node.record(state=draw(st.sampled_from(NodeState))) for node in NODES for _ in range(draw(st.integers(0, 4)))
    ]
    repeated = records + draw(st.lists(st.sampled_from(records), max_size=10)) if records else []
    random.Random(draw(st.integers(0, 2**32))).shuffle(repeated)
    return repeated


@given(histories())
@settings(max_examples=60)
def test_the_book_holds_the_newest_record_of_each_node(history: list[SealedRecord]) -> None:
    book = RecordBook(MODEL)
    for sealed in history:
        book.add(sealed.sealed)
    newest: dict[str, SealedRecord] = {}
    for sealed in sorted(history, key=lambda sealed: sealed.record.generation):
        newest[sealed.record.node] = sealed
    assert book.alive() == tuple(
        sealed for _, sealed in sorted(newest.items()) if sealed.record.state is not NodeState.GONE
    )
    assert all(book.get(node) == sealed for node, sealed in newest.items())
    assert set(book.rejected) <= {"stale"}


@pytest.mark.parametrize(
    "changes",
    [
        {"free_tokens": 2**63},
        {"total_tokens": 2**63},
        {"rate": 1e30},
        {"hop_s": 1e30},
        {"coordinate": (1e30, 0.0, 0.1, 0.5)},
        {"coordinate": (0.0, 0.0, -1.0, 0.5)},
        {"coordinate": (0.0, 0.0, 0.1, -0.5)},
        {"coordinate": (0.0, 0.0, 0.1, 0.0)},
    ],
)
def test_a_number_out_of_all_bounds_is_malformed(changes: dict[str, Any]) -> None:
    """One such record would break the arithmetic of every client: integers past 64 bits, predictions below zero."""
    node = NODES[0]
    with pytest.raises(Malformed):
        unseal(seal(replace(node.record().record, **changes), node).sealed)
