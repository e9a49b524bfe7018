"""What a stranger may send to a node's port: messages that are wrong in every way we could think of, without end."""

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from treeswarm import PROTOCOL_VERSION
from treeswarm.protocol import messages as m
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.transport.seam import StreamKind
from treeswarm.wire import treeswarm_pb2 as pb
from treeswarm.wire.codec import encode

SESSIONS = [bytes([65 + i]) * m.SESSION_ID_BYTES for i in range(8)]
TICKET = b"T" * m.TICKET_BYTES
NOBODY = "127.0.0.1:9"
PROMPT_ROWS = 3
SETTINGS = (
    SamplingSettings(0.7, 0, 0.9, 1, 0),
    SamplingSettings(1e-9, 2**31 - 1, 1e-9, 2**64 - 1, 2**32 - 1),
    SamplingSettings(100.0, 1, 1.0, 0, 0),
)
EXTREMES = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
REALS = (0.0, -1.0, 1e-45, 1e308, float("inf"), float("-inf"), float("nan"))
# Megabytes take their time; one in so many messages is one of these.
OVERSIZED_ONE_IN = 300
# A packed append's zstd frame: it says that its content is a terabyte, in 16 bytes.
BOMB = bytes.fromhex("28b52ffde0") + (1 << 40).to_bytes(8, "little") + bytes.fromhex("030010")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True)
class Case:
    """What one message is made from."""

    chance: random.Random
    kind: StreamKind
    described: m.Description

    def valid(self) -> bytes:
        """A well-formed message, of this kind of stream."""
        return _valid(self.chance, self.kind, self.described)


@dataclass(frozen=True)
class HostileMessage:
    """One message and the stream it is for."""

    kind: StreamKind
    data: bytes
    what: str
    """How it is wrong, for people."""


def hostile_messages(seed: int, described: m.Description) -> Iterator[HostileMessage]:
    """Endless, and the same for the same seed.  Knows what the node serves, so that some get far."""
    chance = random.Random(seed)
    while True:
        kind = chance.choice(list(StreamKind))
        if chance.randrange(OVERSIZED_ONE_IN) == 0:
            yield HostileMessage(kind, bytes(m.MAX_MESSAGE_BYTES + chance.choice((1, 1 << 20))), "oversized")
        else:
            what, wrong = chance.choice(list(WAYS.items()))
            yield HostileMessage(kind, wrong(Case(chance, kind, described)), what)


def opening(described: m.Description, session: bytes) -> m.Open:
    """An honest one: the lie comes later."""
    tail = described.span.end == described.blocks
    hop = None if tail else m.NextHop(NOBODY, TICKET)
    return m.Open(PROTOCOL_VERSION, session, 0, described.span, described.numerics, 64, 16, TICKET, hop)


def _valid(chance: random.Random, kind: StreamKind, described: m.Description) -> bytes:
    session = chance.choice(SESSIONS)
    if kind is StreamKind.LINK:
        return encode(_hello(chance) if chance.random() < 0.2 else _append(chance, described))
    return encode(
        chance.choice(
            (
                m.Describe(chance.choice((PROTOCOL_VERSION, 0, 99))),
                opening(described, session),
                _greedy(chance, described, session),
                m.Hint(session, chance.choice(EXTREMES[:8]), chance.choice(EXTREMES[:8])),
                m.Ping(chance.choice(EXTREMES)),
                m.Close(session),
            )
        )
    )


def _greedy(chance: random.Random, described: m.Description, session: bytes) -> m.Open:
    start = chance.randrange(described.blocks)
    room = chance.choice((1, 100, described.max_positions, m.MAX_TRUNK))
    hop = chance.choice((None, m.NextHop(chance.choice((NOBODY, "", "no address", "[::1]:0#")), TICKET)))
    span, crown = Span(start, start + chance.randint(1, 3)), chance.choice((1, 16, m.MAX_CROWN))
    return m.Open(PROTOCOL_VERSION, session, 0, span, described.numerics, room, crown, TICKET, hop)


def _hello(chance: random.Random) -> m.LinkHello:
    return m.LinkHello(PROTOCOL_VERSION, chance.choice(SESSIONS), 0, chance.choice((TICKET, bytes(len(TICKET)))))


def honest_prompt(described: m.Description) -> m.Append:
    """The first frame of a session, as a client would send it: ids 1 to 3."""
    return _frame_of(described, rows=PROMPT_ROWS, seq=0, first_id=1, prefill=True)


def _append(chance: random.Random, described: m.Description) -> m.Append:
    """What could follow that prompt, with nothing wrong or a little."""
    honest = _frame_of(described, rows=chance.choice((1, 2, 8, 13)), seq=1, first_id=PROMPT_ROWS + 1, prefill=False)
    rows = honest.rows
    oddities: tuple[dict[str, Any], ...] = (
        {},
        {"fresh": True, "prefill": True, "answers": m.Answers.NONE},
        {"seq": chance.choice((0, 2, 500, 2**32 - 1))},
        {"epoch": 1},
        {"first_id": chance.choice((0, 1, 2**31))},
        {"commit": np.array(chance.choice(([1], [4], [4, 5], [5, 4], [9])), np.uint32)},
        {"parents": np.array([chance.choice((0, 3, 4, 5, 99)) for _ in range(rows)], np.uint32)},
        {"tokens": np.array([chance.choice((0, described.vocab_size, 2**32 - 1)) for _ in range(rows)], np.uint32)},
        {"skipped": np.array([chance.random() < 0.5 for _ in range(rows)], np.bool_)},
        {"hidden": chance.randbytes(len(honest.hidden) or 64)},
        {"hidden": honest.hidden[:-1]},
        {"planes": chance.choice((1, 2, 4)), "hidden": chance.choice((honest.hidden or BOMB, BOMB))},
        {"settings": chance.choice(SETTINGS)},
        {"settings": chance.choice(SETTINGS), "answers": m.Answers.NONE},
        _frame_of(
            described, rows=chance.choice((0, 17, 65)), seq=1, first_id=4, prefill=chance.random() < 0.5
        ).__dict__,
    )
    return replace(honest, **chance.choice(oddities))


def _frame_of(described: m.Description, *, rows: int, seq: int, first_id: int, prefill: bool) -> m.Append:
    """A chain below the tip."""
    width = described.numerics.row_bytes(described.hidden_size)
    return m.Append(
        epoch=0,
        seq=seq,
        commit=np.empty(0, np.uint32),
        first_id=first_id,
        parents=np.arange(first_id - 1, first_id - 1 + rows, dtype=np.uint32),
        tokens=np.ones(rows, np.uint32),
        prefill=prefill,
        answers=m.Answers.LAST,
        settings=SamplingSettings(),
        skipped=np.zeros(rows, np.bool_),
        hidden=bytes(rows * width) if described.span.start else b"",
    )


def _random(case: Case) -> bytes:
    return case.chance.randbytes(case.chance.choice((0, 1, 7, 100, 4096)))


def _flipped(case: Case) -> bytes:
    changed = bytearray(case.valid())
    for _ in range(case.chance.randint(1, 4)):
        changed[case.chance.randrange(len(changed))] ^= 1 << case.chance.randrange(8)
    return bytes(changed)


def _truncated(case: Case) -> bytes:
    valid = case.valid()
    return valid[: case.chance.randrange(len(valid))]


def _doubled(case: Case) -> bytes:
    """Two in one: a parser merges them."""
    return case.valid() + case.valid()


def _length_too_far(case: Case) -> bytes:
    """A field that says it is gigabytes long."""
    valid, tag = case.valid(), bytes([case.chance.randint(1, 15) << 3 | 2])
    length = case.chance.choice((b"\xff\xff\xff\xff\x07", b"\xff" * 9 + b"\x01", b"\xff" * 11))
    return valid[:2] + tag + length + valid[2:]


def _wrong_way(case: Case) -> bytes:
    return encode(case.chance.choice((m.Pong(1), m.Ping(1), _hello(case.chance))))


def _field_changed(case: Case) -> bytes:
    made = pb.ControlUp() if case.kind is StreamKind.CONTROL else pb.LinkUp()
    made.ParseFromString(case.valid())
    inner: Any = getattr(made, str(made.WhichOneof("message")))
    field = case.chance.choice(inner.DESCRIPTOR.fields)
    while field.message_type is not None and not _repeated(inner, field):
        inner = getattr(inner, field.name)
        field = case.chance.choice(inner.DESCRIPTOR.fields)
    if field.message_type is None:
        setattr(inner, field.name, _anything(case.chance, field))
    else:
        inner.timings.extend([pb.HopTiming(queue_us=2**32 - 1)] * case.chance.choice((1, m.MAX_HOPS, m.MAX_HOPS + 1)))
    return bytes(made.SerializeToString())


def _repeated(inner: Any, field: Any) -> bool:
    return not hasattr(getattr(inner, field.name), "DESCRIPTOR")


WAYS: dict[str, Callable[[Case], bytes]] = {
    "random bytes": _random,
    "flipped bits": _flipped,
    "truncated": _truncated,
    "two in one": _doubled,
    "a field changed": _field_changed,
    "a length too far": _length_too_far,
    "out of order": Case.valid,
    "the wrong way": _wrong_way,
}


def _anything(chance: random.Random, field: Any) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_STRING:
            text = chance.choice(("", "x", "127.0.0.1:9", "ü" * 300, "\0" * 5000))
            return text.encode() if field.type == field.TYPE_BYTES else text
        case field.CPPTYPE_DOUBLE:
            return chance.choice(REALS)
        case field.CPPTYPE_BOOL:
            return chance.random() < 0.5
        case field.CPPTYPE_UINT32:
            return chance.choice(EXTREMES[:8])
        case field.CPPTYPE_UINT64:
            return chance.choice(EXTREMES)
        case _:
            return chance.randrange(3)


# ---------------------------------------------------------------- below gRPC


def hostile_first_bytes(seed: int, path: str) -> Iterator[bytes]:
    """What else may come first on a connection, in the clear or inside TLS.  Endless."""
    chance = random.Random(seed)
    while True:
        settings = _frame(4, 0, b"")
        call = PREFACE + settings + _frame(1, 1, _headers(path), flags=4)
        length = chance.choice((0, 1, 2**31, 2**32 - 1))
        yield chance.choice(
            (
                chance.randbytes(chance.choice((1, 100, 5000))),
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(200),  # a client hello, at first
                PREFACE + chance.randbytes(300),
                PREFACE + settings + _frame(chance.randrange(12), chance.choice((0, 1, 2**31)), chance.randbytes(50)),
                PREFACE + settings + _frame(1, 1, chance.randbytes(40), flags=4),
                call + _frame(0, 1, struct.pack(">BI", chance.choice((0, 1)), length) + chance.randbytes(20)),
                call
                + b"".join(_frame(3, 1, bytes(4)) + _frame(1, i, _headers(path), flags=4) for i in range(3, 99, 2)),
            )
        )


def _frame(kind: int, stream: int, payload: bytes, flags: int = 0) -> bytes:
    """HTTP/2's."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _headers(path: str) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "https",
        ":path": path,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    literal = (b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in fields.items())
    return b"".join(literal)
