"""Converts messages to bytes and back.

Decoding checks every field, so that a decoded message is well-formed even if the sender is hostile.  The decoders
raise Malformed, which names the field, and nothing else.
"""

from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto
from numpy.typing import NDArray

from treeswarm.errors import BadRequest, Malformed
from treeswarm.protocol import drive_messages as d
from treeswarm.protocol import messages as m
from treeswarm.protocol import node_messages as n
from treeswarm.protocol.prefix import DIGEST_BYTES, MAX_PREFIX_UNITS, SCOPE_BYTES, Prefix
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.protocol.tap_sums import HEAD_DIGEST_BYTES, MAX_TAPS, TapRequest, TapSums
from treeswarm.protocol.text_rules import DIGEST_BYTES as RULES_DIGEST_BYTES
from treeswarm.wire import treeswarm_pb2 as pb
from treeswarm.wire.encode import encode
from treeswarm.wire.rules_codec import rules_in

__all__ = ["decode_control_down", "decode_control_up", "decode_link_down", "decode_link_up", "encode"]

U32_LIMIT = 2**32
ANSWERS = {pb.NONE: m.Answers.NONE, pb.LAST: m.Answers.LAST, pb.ALL: m.Answers.ALL}
DTYPES = {"float32", "bfloat16", "float16"}
ACTIVATIONS = {"", "int8"}
VALUE_BYTES = {1, 2, 4}

# Largest log-probability that is accepted: a softmax in float32 may round beyond 1.
MOST_LOGPROB = 1e-4


def decode_control_up(data: bytes) -> m.ControlUp:
    """Decode a message that a client sends on a control stream.  Raises Malformed."""
    return _decode(pb.ControlUp(), data)  # type: ignore[return-value]


def decode_control_down(data: bytes) -> m.ControlDown:
    """Decode a message that a node sends on a control stream.  Raises Malformed."""
    return _decode(pb.ControlDown(), data)  # type: ignore[return-value]


def decode_link_up(data: bytes) -> m.LinkUp:
    """Decode a message that the upstream end sends on a link.  Raises Malformed."""
    return _decode(pb.LinkUp(), data)  # type: ignore[return-value]


def decode_link_down(data: bytes) -> m.LinkDown:
    """Decode a message that the downstream end sends on a link.  Raises Malformed."""
    return _decode(pb.LinkDown(), data)  # type: ignore[return-value]


def _decode(envelope: Proto, data: bytes) -> m.Message:
    if len(data) > m.MAX_MESSAGE_BYTES:
        raise Malformed(f"a message of {len(data)} bytes is over the limit of {m.MAX_MESSAGE_BYTES}")
    try:
        envelope.ParseFromString(data)
    except DecodeError as error:
        raise Malformed(f"bytes that are no {envelope.DESCRIPTOR.name}: {error}") from None
    kind = envelope.WhichOneof("message")
    if kind is None:
        raise Malformed(f"a {envelope.DESCRIPTOR.name} without a message")
    try:
        return _IN[kind](getattr(envelope, kind))
    except BadRequest as error:  # Spans and sampling settings check their own fields.
        raise Malformed(f"{kind}: {error}") from None


def _require(valid: bool, field: str, problem: str) -> None:
    if not valid:
        raise Malformed(f"{field}: {problem}")


def _id_bytes(value: bytes, field: str, length: int) -> bytes:
    _require(len(value) == length, field, f"{len(value)} bytes, expected {length}")
    return value


def _session(value: bytes) -> bytes:
    return _id_bytes(value, "session", m.SESSION_ID_BYTES)


def _text(value: str, field: str, limit: int = m.MAX_TEXT) -> str:
    size = len(value.encode())
    _require(size <= limit, field, f"{size} bytes, at most {limit}")
    return value


def _count(value: int, field: str, least: int, most: int) -> int:
    _require(least <= value <= most, field, f"{value} is not between {least} and {most}")
    return value


def _array(data: bytes, field: str, dtype: str, limit: int = m.MAX_ROWS) -> NDArray[Any]:
    """Return a read-only view of the message's own bytes, which must be 4-byte elements."""
    _require(len(data) % 4 == 0, field, f"{len(data)} bytes are no whole number of 4-byte elements")
    _require(len(data) <= 4 * limit, field, f"{len(data) // 4} elements, at most {limit}")
    return np.frombuffer(data, dtype)


def _timings_in(timings: Any) -> tuple[m.HopTiming, ...]:
    _require(len(timings) <= m.MAX_HOPS, "timings", f"{len(timings)} hops, at most {m.MAX_HOPS}")
    return tuple(m.HopTiming(t.queue_us, t.compute_us, t.rows, t.batch_sessions) for t in timings)


def _profile_in(points: Any) -> m.Profile:
    most = m.MAX_PROFILE_POINTS
    _require(len(points) <= most, "profile", f"{len(points)} points, at most {most}")
    rows = [_count(point.rows, "profile.rows", 1, m.MAX_ROWS) for point in points]
    _require(all(a < b for a, b in pairwise(rows)), "profile.rows", "rows do not rise")
    micros = [_count(point.microseconds, "profile.microseconds", 1, m.MAX_PROFILE_US) for point in points]
    return tuple(zip(rows, micros, strict=True))


def _numerics_in(message: pb.NumericsClass) -> m.NumericsClass:
    _require(message.dtype in DTYPES, "numerics.dtype", "not one of " + ", ".join(sorted(DTYPES)))
    _require(message.activations in ACTIVATIONS, "numerics.activations", "not one of native, int8")
    return m.NumericsClass(
        weights=_text(message.weights, "numerics.weights", 128),
        dtype=message.dtype,
        quantization=_text(message.quantization, "numerics.quantization", 64),
        activations=message.activations,
    )


def _description_in(message: pb.Description) -> m.Description:
    return m.Description(
        version=message.version,
        software=_text(message.software, "software", 128),
        span=Span(message.span.start, message.span.end),
        blocks=_count(message.blocks, "blocks", message.span.end, 2**16),
        vocab_size=_count(message.vocab_size, "vocab_size", 1, 2**31),
        hidden_size=_count(message.hidden_size, "hidden_size", 1, 2**20),
        max_positions=_count(message.max_positions, "max_positions", 1, 2**31),
        config=_text(message.config, "config", 128),
        numerics=_numerics_in(message.numerics),
        attention=_text(message.attention, "attention", 128),
        trunk_free=message.trunk_free,
        frames=message.frames,
        forwards=message.forwards,
        forward_sessions=message.forward_sessions,
        sessions=message.sessions,
        opened=message.opened,
        resumed=message.resumed,
        refused=message.refused,
        prefix_hits=message.prefix_hits,
        prefix_tokens=message.prefix_tokens,
        skipped_rows=message.skipped_rows,
        shared_pages=message.shared_pages,
    )


def _open_in(message: pb.Open) -> m.Open:
    return m.Open(
        version=message.version,
        session=_session(message.session),
        epoch=message.epoch,
        span=Span(message.span.start, message.span.end),
        numerics=_numerics_in(message.numerics),
        trunk_room=_count(message.trunk_room, "trunk_room", 1, m.MAX_TRUNK),
        crown_room=_count(message.crown_room, "crown_room", 1, m.MAX_CROWN),
        ticket=_id_bytes(message.ticket, "ticket", m.TICKET_BYTES),
        next_hop=_hop_in(message),
        resumption=_resumption_in(message.resumption) if message.HasField("resumption") else None,
        forwards_replay=message.forwards_replay,
        prefix=_prefix_in(message),
        alternatives=_count(message.alternatives, "alternatives", 0, m.MAX_ALTERNATIVES),
        proposal_nodes=_count(message.proposal_nodes, "proposal_nodes", 0, m.MAX_PROPOSAL),
        taps=_tap_request_in(message),
        rules=rules_in(message.rules) if message.HasField("rules") else None,
        alternative_logprobs=message.alternative_logprobs,
    )


def _resume_in(message: pb.Resume) -> m.Resume:
    return m.Resume(
        version=message.version,
        session=_session(message.session),
        epoch=message.epoch,
        resumption=_resumption_in(message.resumption),
        ticket=_id_bytes(message.ticket, "ticket", m.TICKET_BYTES),
        next_hop=_hop_in(message),
        replays=message.replays,
        taps=_tap_request_in(message),
    )


def _tap_request_in(message: pb.Open | pb.Resume) -> TapRequest | None:
    if not message.HasField("taps"):
        return None
    head = _id_bytes(message.taps.head, "taps.head", HEAD_DIGEST_BYTES)
    return TapRequest(head.hex(), _count(message.taps.prompt_rows, "taps.prompt_rows", 0, m.MAX_TRUNK))


def _hop_in(message: pb.Open | pb.Resume) -> m.NextHop | None:
    if not message.HasField("next_hop"):
        return None
    ticket = _id_bytes(message.next_hop.ticket, "next_hop.ticket", m.TICKET_BYTES)
    return m.NextHop(_text(message.next_hop.address, "next_hop.address", 512), ticket)


def _prefix_in(message: pb.Open) -> Prefix | None:
    if not message.prefix_scope and not message.prefix_digests:
        return None
    units, rest = divmod(len(message.prefix_digests), DIGEST_BYTES)
    _require(not rest, "prefix_digests", f"{len(message.prefix_digests)} bytes are no digests of {DIGEST_BYTES}")
    _count(units, "prefix_digests", 0, MAX_PREFIX_UNITS)
    edges = range(0, len(message.prefix_digests), DIGEST_BYTES)
    digests = tuple(message.prefix_digests[start : start + DIGEST_BYTES] for start in edges)
    return Prefix(_id_bytes(message.prefix_scope, "prefix_scope", SCOPE_BYTES), digests)


def _resumption_in(message: pb.Resumption) -> m.Resumption:
    return m.Resumption(_count(message.trunk_length, "trunk_length", 0, m.MAX_TRUNK), message.tip)


def _records_in(message: pb.Records) -> m.Records:
    _require(len(message.sealed) <= m.MAX_RECORDS, "records", f"{len(message.sealed)} records, at most {m.MAX_RECORDS}")
    # A record that is too large is left for the reader to reject and count, so that the other records are not lost.
    return m.Records(tuple(message.sealed), message.clock)


def _report_lost_in(message: pb.ReportLost) -> m.ReportLost:
    _require(len(message.nodes) <= m.MAX_LOST, "nodes", f"{len(message.nodes)} nodes, at most {m.MAX_LOST}")
    return m.ReportLost(tuple(_text(node, "nodes", 64) for node in message.nodes))


def _answer_in(message: pb.Answer) -> m.Answer:
    ids, tokens = _array(message.ids, "ids", "<u4"), _array(message.tokens, "tokens", "<u4")
    logprobs = _logprobs_in(message.logprobs, "logprobs")
    _require(len(ids) == len(tokens) == len(logprobs), "answer", "ids, tokens and logprobs differ in length")
    best = _alternatives_in(message.alternatives, len(ids))
    return m.Answer(
        session=_session(message.session),
        epoch=message.epoch,
        seq=message.seq,
        ids=ids,
        tokens=tokens,
        logprobs=logprobs,
        timings=_timings_in(message.timings),
        alternatives=best,
        alternative_logprobs=_alternative_logprobs_in(message.alternative_logprobs, best),
        scored=_scored_in(message.scored) if message.HasField("scored") else None,
    )


def _scored_in(message: pb.ScoredRows) -> m.ScoredRows:
    logprobs = _logprobs_in(message.logprobs, "scored.logprobs")
    best = _alternatives_in(message.alternatives, len(logprobs))
    return m.ScoredRows(logprobs, best, _alternative_logprobs_in(message.alternative_logprobs, best))


def _logprobs_in(data: bytes, field: str, limit: int = m.MAX_ROWS) -> NDArray[Any]:
    """Return log-probabilities.  Raises Malformed for those that are none: not numbers, or above 0."""
    logprobs = _array(data, field, "<f4", limit)
    # Not (a > b), because a comparison with NaN is false.
    _require(bool((logprobs <= MOST_LOGPROB).all()), field, "a log-probability is above 0 or not a number")
    return logprobs


def _alternative_logprobs_in(data: bytes, best: NDArray[Any]) -> NDArray[Any]:
    flat = _logprobs_in(data, "alternative_logprobs", m.MAX_ROWS * m.MAX_ALTERNATIVES)
    if not len(flat):
        return m.no_logprobs()
    _require(len(flat) == best.size, "alternative_logprobs", f"{len(flat)} for {best.size} alternatives")
    return flat.reshape(best.shape)


def _alternatives_in(data: bytes, rows: int) -> NDArray[Any]:
    flat = _array(data, "alternatives", "<u4", m.MAX_ROWS * m.MAX_ALTERNATIVES)
    if not len(flat):
        return m.no_alternatives()
    divisible = rows > 0 and len(flat) % rows == 0
    _require(divisible, "alternatives", f"{len(flat)} tokens cannot be divided evenly among {rows} rows")
    return flat.reshape(rows, _count(len(flat) // rows, "alternatives", 1, m.MAX_ALTERNATIVES))


def _proposal_in(message: pb.Proposal) -> m.Proposal:
    parents, tokens, scores = (
        _array(data, name, dtype, m.MAX_PROPOSAL)
        for data, name, dtype in (
            (message.parents, "parents", "<u4"),
            (message.tokens, "tokens", "<u4"),
            (message.scores, "scores", "<f4"),
        )
    )
    _require(len(parents) == len(tokens) == len(scores), "proposal", "parents, tokens and scores differ in length")
    _require(bool((parents <= np.arange(len(parents))).all()), "parents", "a node comes before its parent")
    falling = bool(np.isfinite(scores).all()) and bool((np.diff(scores, prepend=np.float32(0)) <= 0).all())
    _require(falling, "scores", "not finite, above 0 or rising")
    siblings = set(zip(parents.tolist(), tokens.tolist(), strict=True))
    _require(len(siblings) == len(tokens), "tokens", "two siblings have the same token")
    return m.Proposal(_session(message.session), message.epoch, message.tip, message.root, parents, tokens, scores)


def _fault_in(message: pb.Fault) -> m.Fault:
    codes = {code.value for code in m.FaultCode}
    _require(len(message.session) in {0, m.SESSION_ID_BYTES}, "session", f"{len(message.session)} bytes")
    code = m.FaultCode(message.code) if message.code in codes else m.FaultCode.REFUSED  # A code of a newer release.
    return m.Fault(message.session, code, _text(message.message, "message"), message.fatal)


def _append_in(message: pb.Append) -> m.Append:
    parents, tokens = _array(message.parents, "parents", "<u4"), _array(message.tokens, "tokens", "<u4")
    rows = len(tokens)
    _require(len(parents) == rows, "parents", f"{len(parents)} parents for {rows} tokens")
    _require(message.first_id + rows <= U32_LIMIT, "first_id", "node ids run past 32 bits")
    _require(message.answers in ANSWERS, "answers", f"{message.answers} is unknown")
    skipped = _bits(message.skipped, "skipped", rows)
    scored = _array(message.scored, "scored", "<u4", rows if message.prefill else 0)
    return m.Append(
        epoch=message.epoch,
        seq=message.seq,
        commit=_array(message.commit, "commit", "<u4"),
        first_id=message.first_id,
        parents=parents,
        tokens=tokens,
        prefill=message.prefill,
        answers=ANSWERS[message.answers],
        settings=_settings_in(message.settings),
        skipped=skipped,
        hidden=message.hidden,
        timings=_timings_in(message.timings),
        fresh=message.fresh,
        replay=message.replay,
        prefix=_count(message.prefix, "prefix", 0, m.MAX_TRUNK),
        planes=_planes_in(message),
        tap_sums=_tap_sums_in(message.tap_sums, skipped) if message.HasField("tap_sums") else None,
        scored=scored,
    )


def _tap_sums_in(message: pb.TapSums, skipped: NDArray[np.bool_]) -> TapSums:
    """Return the sums, whose size only the session knows."""
    _require(1 <= len(message.blocks) <= MAX_TAPS, "tap_sums.blocks", f"{len(message.blocks)} blocks")
    _require(all(a < b for a, b in pairwise(message.blocks)), "tap_sums.blocks", "blocks do not rise")
    _count(message.blocks[-1], "tap_sums.blocks", 0, 2**16)
    sums = TapSums(_bits(message.rows, "tap_sums.rows", len(skipped)), tuple(message.blocks), message.data)
    _require(sums.count > 0, "tap_sums.rows", "no row has a sum")
    _require(not (sums.rows & skipped).any(), "tap_sums.rows", "a row that is skipped has a sum")
    divisible = len(sums.data) > 0 and len(sums.data) % sums.count == 0
    _require(divisible, "tap_sums.data", f"{len(sums.data)} bytes cannot be divided evenly among {sums.count} rows")
    return sums


def _settings_in(settings: pb.SamplingSettings) -> SamplingSettings:
    return SamplingSettings(settings.temperature, settings.top_k, settings.top_p, settings.seed, settings.sample)


def _drive_in(message: pb.Drive) -> d.Drive:
    prompt = _array(message.prompt, "prompt", "<u4", d.MAX_DRIVEN_PROMPT)
    _require(len(prompt) > 0, "prompt", "it is empty")
    secret = message.prefix_secret
    return d.Drive(
        version=message.version,
        text=_id_bytes(message.text, "text", m.SESSION_ID_BYTES),
        numerics=_numerics_in(message.numerics),
        prompt=prompt,
        settings=_settings_in(message.settings),
        max_new_tokens=_count(message.max_new_tokens, "max_new_tokens", 1, m.MAX_TRUNK),
        stop_ids=_array(message.stop_ids, "stop_ids", "<u4", d.MAX_STOP_IDS),
        tree_size=None if message.auto_tree else _count(message.tree_size, "tree_size", 0, m.MAX_CROWN),
        prefix_secret=_id_bytes(secret, "prefix_secret", SCOPE_BYTES) if secret else b"",
        rules=rules_in(message.rules) if message.HasField("rules") else None,
    )


def _driven_in(message: pb.DrivenTokens) -> d.DrivenTokens:
    tokens, logprobs = _array(message.tokens, "tokens", "<u4"), _logprobs_in(message.logprobs, "logprobs")
    _require(len(tokens) == len(logprobs), "driven tokens", "tokens and logprobs differ in length")
    _require(len(message.hops) <= m.MAX_HOPS, "hops", f"{len(message.hops)} hops, at most {m.MAX_HOPS}")
    return d.DrivenTokens(
        text=_id_bytes(message.text, "text", m.SESSION_ID_BYTES),
        tokens=tokens,
        logprobs=logprobs,
        traversal=_driven_traversal_in(message.traversal),
        hops=tuple(
            d.DrivenHop(
                _text(hop.node, "hops.node", 64),
                _text(hop.address, "hops.address", 512),
                Span(hop.span.start, hop.span.end),
            )
            for hop in message.hops
        ),
        prefix_rows=_count(message.prefix_rows, "prefix_rows", 0, m.MAX_TRUNK),
    )


def _driven_traversal_in(message: pb.DrivenTraversal) -> d.DrivenTraversal:
    for name in ("seconds_us", "compute_us", "queue_us", "draft_us"):
        _count(getattr(message, name), name, 0, d.MAX_TRAVERSAL_US)
    _count(message.accepted, "accepted", 0, message.drafted)
    _count(message.repairs, "repairs", 0, d.MAX_REPAIRS)
    return d.DrivenTraversal(**{field.name: getattr(message, field.name) for field in fields(d.DrivenTraversal)})


def _planes_in(message: pb.Append) -> int:
    """Return the number of bytes per value of compressed rows, or 0.

    `hidden` stays compressed here: only the session knows what size it must have.
    """
    supported = not message.planes or message.planes in VALUE_BYTES
    _require(supported, "planes", f"values of {message.planes} bytes are not supported")
    _require(not message.planes or bool(message.hidden), "planes", "there are no rows to decompress")
    return message.planes


def _bits(data: bytes, field: str, rows: int) -> NDArray[np.bool_]:
    if not data:
        return np.zeros(rows, np.bool_)
    _require(len(data) == (rows + 7) // 8, field, f"{len(data)} bytes for {rows} rows")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=rows, bitorder="little").astype(np.bool_)


_IN: dict[str, Callable[[Any], m.Message]] = {
    "describe": lambda q: m.Describe(q.version),
    "open": _open_in,
    "hint": lambda h: m.Hint(_session(h.session), h.trunk_length, h.tip),
    "ping": lambda p: m.Ping(p.stamp, _session(p.session) if p.session else b""),
    "close": lambda c: m.Close(_session(c.session)),
    "description": _description_in,
    "opened": lambda o: m.Opened(
        _session(o.session),
        o.epoch,
        o.credit_rows,
        _profile_in(o.profile),
        _count(o.prefix_rows, "prefix_rows", 0, m.MAX_TRUNK),
        _count(o.proposal_nodes, "proposal_nodes", 0, m.MAX_PROPOSAL),
        _id_bytes(o.rules_digest, "rules_digest", RULES_DIGEST_BYTES) if o.rules_digest else b"",
    ),
    "answer": _answer_in,
    "proposal": _proposal_in,
    "pong": lambda p: m.Pong(p.stamp, p.received, p.passed_on, p.replayed),
    "resume": _resume_in,
    "watch": lambda w: m.Watch(w.version, w.everyone, w.clock),
    "records": _records_in,
    "dial_back": lambda b: n.DialBack(_text(b.address, "address", 512)),
    "dialled_back": lambda b: n.DialledBack(b.reached, _text(b.why, "why")),
    "manage": lambda o: n.Manage(
        _text(o.action, "action", 32), o.stamp, _id_bytes(o.signature, "signature", m.SIGNATURE_BYTES)
    ),
    "managed": lambda o: n.Managed(_text(o.message, "message")),
    "find_swarm": lambda f: n.FindSwarm(f.version),
    "swarm_found": lambda f: n.SwarmFound(_text(f.registry, "registry")),
    "report_lost": _report_lost_in,
    "lease_port": lambda r: n.LeasePort(r.version),
    "port_leased": lambda r: n.PortLeased(
        _count(r.port, "port", 1, 65535), _count(r.fetch_port, "fetch_port", 1, 65535)
    ),
    "incoming_connection": lambda i: n.IncomingConnection(_id_bytes(i.token, "token", m.TICKET_BYTES)),
    "fault": _fault_in,
    "drive": _drive_in,
    "driven_tokens": _driven_in,
    "hello": lambda h: m.LinkHello(
        h.version, _session(h.session), h.epoch, _id_bytes(h.ticket, "ticket", m.TICKET_BYTES), h.warm_up, h.packs
    ),
    "welcome": lambda w: m.LinkWelcome(w.unpacks),
    "append": _append_in,
}
