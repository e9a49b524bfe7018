"""Messages that a hostile peer may send to a node's port, with every flaw that we could think of, without end."""

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
CLOSED_PORT = "127.0.0.1:9"
PROMPT_ROWS = 3
SETTINGS = (
    SamplingSettings(0.7, 0, 0.9, 1, 0),
    SamplingSettings(1e-9, 2**31 - 1, 1e-9, 2**64 - 1, 2**32 - 1),
    SamplingSettings(100.0, 1, 1.0, 0, 0),
)
EXTREMES = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
REALS = (0.0, -1.0, 1e-45, 1e308, float("inf"), float("-inf"), float("nan"))
# Messages of megabytes take long to send, so only one in this many is oversized.
OVERSIZED_ONE_IN = 300
# The zstd frame of a compressed append, 16 bytes long, which declares a content of one terabyte.
BOMB = bytes.fromhex("28b52ffde0") + (1 << 40).to_bytes(8, "little") + bytes.fromhex("030010")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True)
class HostileCase:
    """What one hostile message is made from."""

    random: random.Random
    kind: StreamKind
    described: m.Description

    def valid(self) -> bytes:
        """Return a well-formed message for this kind of stream."""
        return _valid(self.random, self.kind, self.described)


@dataclass(frozen=True)
class HostileMessage:
    """One message and the kind of stream that it is for."""

    kind: StreamKind
    data: bytes
    flaw: str
    """The message's flaw, as a name in reports."""


def hostile_messages(seed: int, described: m.Description) -> Iterator[HostileMessage]:
    """Yield messages without end, the same ones for the same seed.

    They fit what the node serves, so that some of them pass its first checks.
    """
    rng = random.Random(seed)
    while True:
        kind = rng.choice(list(StreamKind))
        if rng.randrange(OVERSIZED_ONE_IN) == 0:
            yield HostileMessage(kind, bytes(m.MAX_MESSAGE_BYTES + rng.choice((1, 1 << 20))), "oversized")
        else:
            flaw, make = rng.choice(list(FLAWS.items()))
            yield HostileMessage(kind, make(HostileCase(rng, kind, described)), flaw)


def honest_open(described: m.Description, session: bytes) -> m.Open:
    """Return an honest request for a session: the hostile messages come after it."""
    tail = described.span.end == described.blocks
    hop = None if tail else m.NextHop(CLOSED_PORT, TICKET)
    return m.Open(PROTOCOL_VERSION, session, 0, described.span, described.numerics, 64, 16, TICKET, hop)


def _valid(rng: random.Random, kind: StreamKind, described: m.Description) -> bytes:
    session = rng.choice(SESSIONS)
    if kind is StreamKind.LINK:
        return encode(_hello(rng) if rng.random() < 0.2 else _append(rng, described))
    return encode(
        rng.choice(
            (
                m.Describe(rng.choice((PROTOCOL_VERSION, 0, 99))),
                honest_open(described, session),
                _greedy_open(rng, described, session),
                m.Hint(session, rng.choice(EXTREMES[:8]), rng.choice(EXTREMES[:8])),
                m.Ping(rng.choice(EXTREMES)),
                m.Close(session),
            )
        )
    )


def _greedy_open(rng: random.Random, described: m.Description, session: bytes) -> m.Open:
    start = rng.randrange(described.blocks)
    room = rng.choice((1, 100, described.max_positions, m.MAX_TRUNK))
    hop = rng.choice((None, m.NextHop(rng.choice((CLOSED_PORT, "", "no address", "[::1]:0#")), TICKET)))
    span, crown = Span(start, start + rng.randint(1, 3)), rng.choice((1, 16, m.MAX_CROWN))
    return m.Open(PROTOCOL_VERSION, session, 0, span, described.numerics, room, crown, TICKET, hop)


def _hello(rng: random.Random) -> m.LinkHello:
    return m.LinkHello(PROTOCOL_VERSION, rng.choice(SESSIONS), 0, rng.choice((TICKET, bytes(len(TICKET)))))


def honest_prompt(described: m.Description) -> m.Append:
    """Return the first append of a session, as a client would send it: ids 1 to 3."""
    return _chain_append(described, rows=PROMPT_ROWS, seq=0, first_id=1, prefill=True)


def _append(rng: random.Random, described: m.Description) -> m.Append:
    """Return an append that could follow that prompt, with one flaw or none."""
    honest = _chain_append(described, rows=rng.choice((1, 2, 8, 13)), seq=1, first_id=PROMPT_ROWS + 1, prefill=False)
    rows = honest.rows
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"fresh": True, "prefill": True, "answers": m.Answers.NONE},
        {"seq": rng.choice((0, 2, 500, 2**32 - 1))},
        {"epoch": 1},
        {"first_id": rng.choice((0, 1, 2**31))},
        {"commit": np.array(rng.choice(([1], [4], [4, 5], [5, 4], [9])), np.uint32)},
        {"parents": np.array([rng.choice((0, 3, 4, 5, 99)) for _ in range(rows)], np.uint32)},
        {"tokens": np.array([rng.choice((0, described.vocab_size, 2**32 - 1)) for _ in range(rows)], np.uint32)},
        {"skipped": np.array([rng.random() < 0.5 for _ in range(rows)], np.bool_)},
        {"hidden": rng.randbytes(len(honest.hidden) or 64)},
        {"hidden": honest.hidden[:-1]},
        {"planes": rng.choice((1, 2, 4)), "hidden": rng.choice((honest.hidden or BOMB, BOMB))},
        {"settings": rng.choice(SETTINGS)},
        {"settings": rng.choice(SETTINGS), "answers": m.Answers.NONE},
        _chain_append(described, rows=rng.choice((0, 17, 65)), seq=1, first_id=4, prefill=rng.random() < 0.5).__dict__,
    )
    return replace(honest, **rng.choice(changes))


def _chain_append(described: m.Description, *, rows: int, seq: int, first_id: int, prefill: bool) -> m.Append:
    """Return an append of a chain of rows below the tip."""
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


def _random(case: HostileCase) -> bytes:
    return case.random.randbytes(case.random.choice((0, 1, 7, 100, 4096)))


def _flipped(case: HostileCase) -> bytes:
    changed = bytearray(case.valid())
    for _ in range(case.random.randint(1, 4)):
        changed[case.random.randrange(len(changed))] ^= 1 << case.random.randrange(8)
    return bytes(changed)


def _truncated(case: HostileCase) -> bytes:
    valid = case.valid()
    return valid[: case.random.randrange(len(valid))]


def _doubled(case: HostileCase) -> bytes:
    """Return two messages as one, which a parser merges."""
    return case.valid() + case.valid()


def _length_too_far(case: HostileCase) -> bytes:
    """Return a message with a field that declares a length of gigabytes."""
    valid, tag = case.valid(), bytes([case.random.randint(1, 15) << 3 | 2])
    length = case.random.choice((b"\xff\xff\xff\xff\x07", b"\xff" * 9 + b"\x01", b"\xff" * 11))
    return valid[:2] + tag + length + valid[2:]


def _wrong_direction(case: HostileCase) -> bytes:
    return encode(case.random.choice((m.Pong(1), m.Ping(1), _hello(case.random))))


def _field_changed(case: HostileCase) -> bytes:
    message = pb.ControlUp() if case.kind is StreamKind.CONTROL else pb.LinkUp()
    message.ParseFromString(case.valid())
    inner: Any = getattr(message, str(message.WhichOneof("message")))
    field = case.random.choice(inner.DESCRIPTOR.fields)
    while field.message_type is not None and not _repeated(inner, field):
        inner = getattr(inner, field.name)
        field = case.random.choice(inner.DESCRIPTOR.fields)
    if field.message_type is None and hasattr(getattr(inner, field.name), "extend"):
        getattr(inner, field.name).extend([_anything(case.random, field)] * case.random.choice((1, 64)))
    elif field.message_type is None:
        setattr(inner, field.name, _anything(case.random, field))
    else:
        inner.timings.extend([pb.HopTiming(queue_us=2**32 - 1)] * case.random.choice((1, m.MAX_HOPS, m.MAX_HOPS + 1)))
    return bytes(message.SerializeToString())


def _repeated(inner: Any, field: Any) -> bool:
    return not hasattr(getattr(inner, field.name), "DESCRIPTOR")


FLAWS: dict[str, Callable[[HostileCase], bytes]] = {
    "random bytes": _random,
    "flipped bits": _flipped,
    "truncated": _truncated,
    "two in one": _doubled,
    "a field changed": _field_changed,
    "a length too far": _length_too_far,
    "out of order": HostileCase.valid,
    "the wrong way": _wrong_direction,
}


def _anything(rng: random.Random, field: Any) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_STRING:
            text = rng.choice(("", "x", "127.0.0.1:9", "ü" * 300, "\0" * 5000))
            return text.encode() if field.type == field.TYPE_BYTES else text
        case field.CPPTYPE_DOUBLE:
            return rng.choice(REALS)
        case field.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case field.CPPTYPE_UINT32:
            return rng.choice(EXTREMES[:8])
        case field.CPPTYPE_UINT64:
            return rng.choice(EXTREMES)
        case _:
            return rng.randrange(3)


# ---------------------------------------------------------------- below gRPC


def hostile_first_bytes(seed: int, path: str) -> Iterator[bytes]:
    """Yield bytes that a peer may begin a connection with, in the clear or inside TLS, without end."""
    rng = random.Random(seed)
    while True:
        settings = _frame(4, 0, b"")
        call = PREFACE + settings + _frame(1, 1, _headers(path), flags=4)
        length = rng.choice((0, 1, 2**31, 2**32 - 1))
        yield rng.choice(
            (
                rng.randbytes(rng.choice((1, 100, 5000))),
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),  # begins as a TLS client hello
                PREFACE + rng.randbytes(300),
                PREFACE + settings + _frame(rng.randrange(12), rng.choice((0, 1, 2**31)), rng.randbytes(50)),
                PREFACE + settings + _frame(1, 1, rng.randbytes(40), flags=4),
                call + _frame(0, 1, struct.pack(">BI", rng.choice((0, 1)), length) + rng.randbytes(20)),
                call
                + b"".join(_frame(3, 1, bytes(4)) + _frame(1, i, _headers(path), flags=4) for i in range(3, 99, 2)),
            )
        )


def _frame(kind: int, stream: int, payload: bytes, flags: int = 0) -> bytes:
    """Return one HTTP/2 frame."""
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
