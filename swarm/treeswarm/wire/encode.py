"""Converts messages to bytes."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
from google.protobuf.message import Message as Proto
from numpy.typing import NDArray

from treeswarm.protocol import drive_messages as d
from treeswarm.protocol import messages as m
from treeswarm.protocol import node_messages as n
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.protocol.tap_sums import TapRequest, TapSums
from treeswarm.wire import treeswarm_pb2 as pb
from treeswarm.wire.rules_codec import rules_out

U32_LIMIT = 2**32
ANSWERS_OUT = {m.Answers.NONE: pb.NONE, m.Answers.LAST: pb.LAST, m.Answers.ALL: pb.ALL}


def encode(message: m.Message) -> bytes:
    """Return the bytes that a stream carries for a message."""
    kind, name, build = _OUT[type(message)]
    return bytes(kind(**{name: build(message)}).SerializeToString())


def _timings_out(timings: tuple[m.HopTiming, ...]) -> list[pb.HopTiming]:
    return [
        pb.HopTiming(
            queue_us=_u32(t.queue_us), compute_us=_u32(t.compute_us), rows=t.rows, batch_sessions=t.batch_sessions
        )
        for t in timings
    ]


def _u32(value: int) -> int:
    """Clamp a number to the range of a u32; a longer duration is sent as the longest one."""
    return max(0, min(value, U32_LIMIT - 1))


def _clipped(text: str) -> str:
    """Shorten an error message to `MAX_TEXT` bytes.  A path in it may contain characters that are no valid text."""
    return text.encode(errors="replace")[: m.MAX_TEXT].decode(errors="ignore")


def _numerics_out(message: m.NumericsClass) -> pb.NumericsClass:
    return pb.NumericsClass(
        weights=message.weights, dtype=message.dtype, quantization=message.quantization, activations=message.activations
    )


def _span_out(span: Span) -> pb.Span:
    return pb.Span(start=span.start, end=span.end)


def _array_out(array: NDArray[Any], dtype: str) -> bytes:
    return array.astype(dtype, copy=False).tobytes()


def _description_out(message: m.Description) -> pb.Description:
    return pb.Description(
        version=message.version,
        software=message.software,
        span=_span_out(message.span),
        blocks=message.blocks,
        vocab_size=message.vocab_size,
        hidden_size=message.hidden_size,
        max_positions=message.max_positions,
        config=message.config,
        numerics=_numerics_out(message.numerics),
        attention=message.attention,
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


def _open_out(message: m.Open) -> pb.Open:
    proto = pb.Open(
        version=message.version,
        session=message.session,
        epoch=message.epoch,
        span=_span_out(message.span),
        numerics=_numerics_out(message.numerics),
        trunk_room=message.trunk_room,
        crown_room=message.crown_room,
        ticket=message.ticket,
        forwards_replay=message.forwards_replay,
        alternatives=message.alternatives,
        proposal_nodes=message.proposal_nodes,
        alternative_logprobs=message.alternative_logprobs,
    )
    if message.next_hop is not None:
        proto.next_hop.CopyFrom(_hop_out(message.next_hop))
    if message.resumption is not None:
        proto.resumption.CopyFrom(_resumption_out(message.resumption))
    if message.prefix is not None:
        proto.prefix_scope, proto.prefix_digests = message.prefix.scope, b"".join(message.prefix.digests)
    if message.taps is not None:
        proto.taps.CopyFrom(_tap_request_out(message.taps))
    if message.rules is not None:
        proto.rules.CopyFrom(rules_out(message.rules))
    return proto


def _resume_out(message: m.Resume) -> pb.Resume:
    proto = pb.Resume(
        version=message.version,
        session=message.session,
        epoch=message.epoch,
        resumption=_resumption_out(message.resumption),
        ticket=message.ticket,
        replays=message.replays,
    )
    if message.next_hop is not None:
        proto.next_hop.CopyFrom(_hop_out(message.next_hop))
    if message.taps is not None:
        proto.taps.CopyFrom(_tap_request_out(message.taps))
    return proto


def _tap_request_out(request: TapRequest) -> pb.TapRequest:
    return pb.TapRequest(head=bytes.fromhex(request.head), prompt_rows=request.prompt_rows)


def _hop_out(hop: m.NextHop) -> pb.NextHop:
    return pb.NextHop(address=hop.address, ticket=hop.ticket)


def _resumption_out(message: m.Resumption) -> pb.Resumption:
    return pb.Resumption(trunk_length=message.trunk_length, tip=message.tip)


def _answer_out(message: m.Answer) -> pb.Answer:
    return pb.Answer(
        session=message.session,
        epoch=message.epoch,
        seq=message.seq,
        ids=_array_out(message.ids, "<u4"),
        tokens=_array_out(message.tokens, "<u4"),
        logprobs=_array_out(message.logprobs, "<f4"),
        timings=_timings_out(message.timings),
        alternatives=_array_out(message.alternatives, "<u4"),
        alternative_logprobs=_array_out(message.alternative_logprobs, "<f4"),
        scored=None if message.scored is None else _scored_out(message.scored),
    )


def _scored_out(scored: m.ScoredRows) -> pb.ScoredRows:
    return pb.ScoredRows(
        logprobs=_array_out(scored.logprobs, "<f4"),
        alternatives=_array_out(scored.alternatives, "<u4"),
        alternative_logprobs=_array_out(scored.alternative_logprobs, "<f4"),
    )


def _proposal_out(message: m.Proposal) -> pb.Proposal:
    return pb.Proposal(
        session=message.session,
        epoch=message.epoch,
        tip=message.tip,
        root=message.root,
        parents=_array_out(message.parents, "<u4"),
        tokens=_array_out(message.tokens, "<u4"),
        scores=_array_out(message.scores, "<f4"),
    )


def _append_out(message: m.Append) -> pb.Append:
    proto = pb.Append(
        epoch=message.epoch,
        seq=message.seq,
        commit=_array_out(message.commit, "<u4"),
        first_id=message.first_id,
        parents=_array_out(message.parents, "<u4"),
        tokens=_array_out(message.tokens, "<u4"),
        prefill=message.prefill,
        answers=ANSWERS_OUT[message.answers],
        settings=_settings_out(message.settings),
        skipped=np.packbits(message.skipped, bitorder="little").tobytes() if message.skipped.any() else b"",
        hidden=message.hidden,
        timings=_timings_out(message.timings),
        fresh=message.fresh,
        replay=message.replay,
        prefix=message.prefix,
        planes=message.planes,
        scored=_array_out(message.scored, "<u4"),
    )
    if message.tap_sums is not None:
        proto.tap_sums.CopyFrom(_tap_sums_out(message.tap_sums))
    return proto


def _tap_sums_out(sums: TapSums) -> pb.TapSums:
    return pb.TapSums(rows=np.packbits(sums.rows, bitorder="little").tobytes(), blocks=sums.blocks, data=sums.data)


def _settings_out(settings: SamplingSettings) -> pb.SamplingSettings:
    return pb.SamplingSettings(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
        sample=settings.sample,
    )


def _drive_out(message: d.Drive) -> pb.Drive:
    return pb.Drive(
        version=message.version,
        text=message.text,
        numerics=_numerics_out(message.numerics),
        prompt=_array_out(message.prompt, "<u4"),
        settings=_settings_out(message.settings),
        max_new_tokens=message.max_new_tokens,
        stop_ids=_array_out(message.stop_ids, "<u4"),
        auto_tree=message.tree_size is None,
        tree_size=message.tree_size or 0,
        prefix_secret=message.prefix_secret,
        rules=None if message.rules is None else rules_out(message.rules),
    )


def _driven_out(message: d.DrivenTokens) -> pb.DrivenTokens:
    hops = [pb.DrivenHop(node=hop.node, address=hop.address, span=_span_out(hop.span)) for hop in message.hops]
    return pb.DrivenTokens(
        text=message.text,
        tokens=_array_out(message.tokens, "<u4"),
        logprobs=_array_out(message.logprobs, "<f4"),
        traversal=pb.DrivenTraversal(**{f.name: getattr(message.traversal, f.name) for f in fields(d.DrivenTraversal)}),
        hops=hops,
        prefix_rows=message.prefix_rows,
    )


_OUT: dict[type, tuple[Callable[..., Proto], str, Callable[[Any], Proto]]] = {
    m.Describe: (pb.ControlUp, "describe", lambda q: pb.Describe(version=q.version)),
    m.Open: (pb.ControlUp, "open", _open_out),
    m.Hint: (pb.ControlUp, "hint", lambda h: pb.Hint(session=h.session, trunk_length=h.trunk_length, tip=h.tip)),
    m.Ping: (pb.ControlUp, "ping", lambda p: pb.Ping(stamp=p.stamp, session=p.session)),
    m.Close: (pb.ControlUp, "close", lambda c: pb.Close(session=c.session)),
    m.Description: (pb.ControlDown, "description", _description_out),
    m.Opened: (
        pb.ControlDown,
        "opened",
        lambda o: pb.Opened(
            session=o.session,
            epoch=o.epoch,
            credit_rows=o.credit_rows,
            profile=[pb.ProfilePoint(rows=rows, microseconds=micros) for rows, micros in o.profile],
            prefix_rows=o.prefix_rows,
            proposal_nodes=o.proposal_nodes,
            rules_digest=o.rules_digest,
        ),
    ),
    m.Answer: (pb.ControlDown, "answer", _answer_out),
    m.Proposal: (pb.ControlDown, "proposal", _proposal_out),
    m.Pong: (
        pb.ControlDown,
        "pong",
        lambda p: pb.Pong(
            stamp=p.stamp, received=_u32(p.received), passed_on=_u32(p.passed_on), replayed=_u32(p.replayed)
        ),
    ),
    m.Fault: (
        pb.ControlDown,
        "fault",
        lambda f: pb.Fault(session=f.session, code=f.code.value, message=_clipped(f.message), fatal=f.fatal),
    ),
    m.Resume: (pb.ControlUp, "resume", _resume_out),
    m.Watch: (pb.ControlUp, "watch", lambda w: pb.Watch(version=w.version, everyone=w.everyone, clock=w.clock)),
    m.Records: (pb.ControlDown, "records", lambda r: pb.Records(sealed=r.sealed, clock=r.clock)),
    n.DialBack: (pb.ControlUp, "dial_back", lambda b: pb.DialBack(address=b.address)),
    n.DialledBack: (
        pb.ControlDown,
        "dialled_back",
        lambda b: pb.DialledBack(reached=b.reached, why=_clipped(b.why)),
    ),
    n.Manage: (
        pb.ControlUp,
        "manage",
        lambda o: pb.Manage(action=o.action, stamp=o.stamp, signature=o.signature),
    ),
    m.ReportLost: (pb.ControlUp, "report_lost", lambda r: pb.ReportLost(nodes=r.nodes)),
    n.Managed: (pb.ControlDown, "managed", lambda o: pb.Managed(message=_clipped(o.message))),
    n.FindSwarm: (pb.ControlUp, "find_swarm", lambda f: pb.FindSwarm(version=f.version)),
    n.SwarmFound: (pb.ControlDown, "swarm_found", lambda f: pb.SwarmFound(registry=f.registry)),
    n.LeasePort: (pb.ControlUp, "lease_port", lambda r: pb.LeasePort(version=r.version)),
    n.PortLeased: (pb.ControlDown, "port_leased", lambda r: pb.PortLeased(port=r.port, fetch_port=r.fetch_port)),
    n.IncomingConnection: (pb.ControlDown, "incoming_connection", lambda i: pb.IncomingConnection(token=i.token)),
    d.Drive: (pb.ControlUp, "drive", _drive_out),
    d.DrivenTokens: (pb.ControlDown, "driven_tokens", _driven_out),
    m.LinkHello: (
        pb.LinkUp,
        "hello",
        lambda h: pb.LinkHello(
            version=h.version, session=h.session, epoch=h.epoch, ticket=h.ticket, warm_up=h.warm_up, packs=h.packs
        ),
    ),
    m.LinkWelcome: (pb.LinkDown, "welcome", lambda w: pb.LinkWelcome(unpacks=w.unpacks)),
    m.Append: (pb.LinkUp, "append", _append_out),
}
