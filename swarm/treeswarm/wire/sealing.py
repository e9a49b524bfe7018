"""Converts records to signed bytes and back.

A record that `unseal` returns was signed by its node, and every field is in bounds.
"""

import math
from itertools import pairwise

from google.protobuf.message import DecodeError

from treeswarm.errors import BadRequest, Malformed
from treeswarm.keys import Signer, verify
from treeswarm.protocol.address import Address
from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.protocol.messages import MAX_RECORD_BYTES, SIGNATURE_BYTES, NumericsClass
from treeswarm.protocol.records import COORDINATE_LENGTH, RECORD_VERSION, NodeRecord, NodeState, SealedRecord
from treeswarm.protocol.spans import Span
from treeswarm.protocol.tap_sums import HEAD_DIGEST_BYTES, MAX_TAPS
from treeswarm.wire import treeswarm_pb2 as pb

# Prefix of the signed bytes, so that a record's signature is never valid for anything else.
RECORD_PREFIX = b"treeswarm record\n"
KEY_BYTES = 32
DIGEST_BYTES = 32
PIN_BYTES = 16
MAX_BLOCKS = 2**16
# Limits that arithmetic over records can rely on: a thousand times what any machine has.
MAX_TOKENS = 2**48
MAX_RATE = 1e9
MAX_SECONDS = 3600.0
DTYPES = {"float32", "bfloat16", "float16"}
ACTIVATIONS = {"", "int8"}


class Forged(Malformed):
    """A record whose signature is not its node's."""


class OtherVersion(Malformed):
    """A record of another release's version."""


def seal(record: NodeRecord, signer: Signer) -> SealedRecord:
    """Sign a record.  Raises BadRequest for a record that would be too large to pass on."""
    assert record.key == signer.public_key
    body = pb.NodeRecord(
        version=RECORD_VERSION,
        generation=record.generation,
        expires=record.expires,
        state=record.state.value,
        address=record.address,
        pin=bytes.fromhex(record.pin),
        reachable=record.reachable,
        name=record.name,
        model=bytes.fromhex(record.model),
        weights=bytes.fromhex(record.numerics.weights),
        dtype=record.numerics.dtype,
        quantization=record.numerics.quantization,
        activations=record.numerics.activations,
        span=pb.Span(start=record.span.start, end=record.span.end),
        blocks=record.blocks,
        rate=record.rate,
        hop_s=record.hop_s,
        free_tokens=record.free_tokens,
        total_tokens=record.total_tokens,
        coordinate=record.coordinate,
        software=record.software,
        driver=int(record.driver),
        speculator=record.speculator,
        agreement=record.agreement,
        tap_head=bytes.fromhex(record.tap_head),
        taps=record.taps,
        rules=record.rules,
        grammar=record.grammar,
    ).SerializeToString()
    signature = signer.sign(RECORD_PREFIX + body)
    sealed = pb.SealedRecord(record=body, key=signer.public_key, signature=signature).SerializeToString()
    if len(sealed) > MAX_RECORD_BYTES:
        raise BadRequest(
            f"this node's record would be {len(sealed)} bytes, at most {MAX_RECORD_BYTES} are passed on: "
            "use a shorter address or model name"
        )
    return SealedRecord(record, sealed)


def unseal(sealed: bytes) -> SealedRecord:
    """Read a record and check its fields and signature.  Dates are left for the reader to check.

    Raises Malformed, and Forged where the signature is wrong.
    """
    if len(sealed) > MAX_RECORD_BYTES:
        raise Malformed(f"a record of {len(sealed)} bytes, at most {MAX_RECORD_BYTES} are allowed")
    envelope, body = pb.SealedRecord(), pb.NodeRecord()
    try:
        envelope.ParseFromString(sealed)
        body.ParseFromString(envelope.record)
    except DecodeError as error:
        raise Malformed(f"bytes that are no record: {error}") from None
    if len(envelope.key) != KEY_BYTES or len(envelope.signature) != SIGNATURE_BYTES:
        raise Malformed("a record's key or signature has a wrong length")
    if not verify(envelope.key, envelope.signature, RECORD_PREFIX + envelope.record):
        raise Forged("a record whose signature is not its node's")
    if body.version != RECORD_VERSION:
        raise OtherVersion(f"version {body.version}, this release reads version {RECORD_VERSION}")
    try:
        return SealedRecord(_read(body, envelope.key), sealed)
    except (BadRequest, ValueError) as error:
        raise Malformed(f"record: {error}") from None


def _read(body: pb.NodeRecord, key: bytes) -> NodeRecord:
    _require(len(body.model) == DIGEST_BYTES, "model is no digest")
    _require(len(body.weights) == DIGEST_BYTES, "weights are no digest")
    _require(len(body.pin) in {0, PIN_BYTES}, "pin has a wrong length")
    _require(body.dtype in DTYPES, "dtype is unknown")
    _require(body.activations in ACTIVATIONS, "activations are unknown")
    _require(body.span.end <= body.blocks <= MAX_BLOCKS, "span is outside the model")
    _require(len(body.coordinate) <= COORDINATE_LENGTH, "coordinate is too long")
    _require(all(map(math.isfinite, [*body.coordinate, body.rate, body.hop_s])), "a number is not finite")
    _require(0 <= body.agreement <= 1, "agreement is out of bounds")
    _require(0 <= body.rate <= MAX_RATE, "rate is out of bounds")
    _require(0 <= body.hop_s <= MAX_SECONDS, "hop_s is out of bounds")
    _require(max(body.free_tokens, body.total_tokens) <= MAX_TOKENS, "tokens are out of bounds")
    _require(all(abs(length) <= MAX_SECONDS for length in body.coordinate), "coordinate is out of bounds")
    _require(len(body.tap_head) in {0, HEAD_DIGEST_BYTES}, "tap_head is no digest")
    _require(bool(body.taps) == bool(body.tap_head), "a head and its taps must come together")
    _require(len(body.taps) <= MAX_TAPS and all(a < b for a, b in pairwise(body.taps)), "taps do not rise")
    _require(all(tap < body.blocks for tap in body.taps), "a tap is outside the model")
    _require(all(length > 0 for length in body.coordinate[2:]), "coordinate has a height or error that is not positive")
    return NodeRecord(
        key=key,
        generation=body.generation,
        expires=body.expires,
        state=NodeState(body.state),
        address=str(Address.parse(body.address)),
        pin=body.pin.hex(),
        reachable=body.reachable,
        name=body.name,
        model=body.model.hex(),
        numerics=NumericsClass(body.weights.hex(), body.dtype, body.quantization, body.activations),
        span=Span(body.span.start, body.span.end),
        blocks=body.blocks,
        rate=body.rate,
        hop_s=body.hop_s,
        free_tokens=body.free_tokens,
        total_tokens=body.total_tokens,
        coordinate=tuple(body.coordinate),
        software=body.software,
        # A later release may know more kinds: all of them drive.
        driver=DriverKind(body.driver) if body.driver in tuple(DriverKind) else DriverKind.MODEL,
        speculator=body.speculator,
        agreement=body.agreement,
        tap_head=body.tap_head.hex(),
        taps=tuple(body.taps),
        rules=body.rules,
        grammar=body.grammar,
    )


def _require(valid: bool, problem: str) -> None:
    if not valid:
        raise ValueError(problem)
