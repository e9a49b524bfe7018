"""Messages to bytes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf.message import Message as Proto
from numpy.typing import NDArray

from treeswarm.protocol import messages as m
from treeswarm.protocol.spans import Span
from treeswarm.wire import treeswarm_pb2 as pb

U32_LIMIT = 2**32
ANSWERS_OUT = {m.Answers.NONE: pb.NONE, m.Answers.LAST: pb.LAST, m.Answers.ALL: pb.ALL}


def encode(message: m.Message) -> bytes:
    """Any message as the bytes its stream carries."""
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
    """A duration that a u32 cannot hold is as good as the longest it can."""
    return max(0, min(value, U32_LIMIT - 1))


def _clipped(text: str) -> str:
    """Words about a failure must arrive, if not all of them; a path in them need not be valid text."""
    return text.encode(errors="replace")[: m.MAX_TEXT].decode(errors="ignore")


def _numerics_out(n: m.NumericsClass) -> pb.NumericsClass:
    return pb.NumericsClass(weights=n.weights, dtype=n.dtype, quantization=n.quantization, activations=n.activations)


def _span_out(span: Span) -> pb.Span:
    return pb.Span(start=span.start, end=span.end)


def _array_out(array: NDArray[Any], dtype: str) -> bytes:
    return array.astype(dtype, copy=False).tobytes()


def _description_out(d: m.Description) -> pb.Description:
    return pb.Description(
        version=d.version,
        software=d.software,
        span=_span_out(d.span),
        blocks=d.blocks,
        vocab_size=d.vocab_size,
        hidden_size=d.hidden_size,
        max_positions=d.max_positions,
        config=d.config,
        numerics=_numerics_out(d.numerics),
        attention=d.attention,
        trunk_free=d.trunk_free,
        frames=d.frames,
        forwards=d.forwards,
        forward_sessions=d.forward_sessions,
        sessions=d.sessions,
        opened=d.opened,
        resumed=d.resumed,
        refused=d.refused,
        prefix_hits=d.prefix_hits,
        prefix_tokens=d.prefix_tokens,
        skipped_rows=d.skipped_rows,
        shared_pages=d.shared_pages,
    )


def _open_out(o: m.Open) -> pb.Open:
    made = pb.Open(
        version=o.version,
        session=o.session,
        epoch=o.epoch,
        span=_span_out(o.span),
        numerics=_numerics_out(o.numerics),
        trunk_room=o.trunk_room,
        crown_room=o.crown_room,
        ticket=o.ticket,
        forwards_replay=o.forwards_replay,
        alternatives=o.alternatives,
    )
    if o.next_hop is not None:
        made.next_hop.CopyFrom(_hop_out(o.next_hop))
    if o.resumption is not None:
        made.resumption.CopyFrom(_resumption_out(o.resumption))
    if o.prefix is not None:
        made.prefix_scope, made.prefix_digests = o.prefix.scope, b"".join(o.prefix.digests)
    return made


def _resume_out(r: m.Resume) -> pb.Resume:
    made = pb.Resume(
        version=r.version,
        session=r.session,
        epoch=r.epoch,
        resumption=_resumption_out(r.resumption),
        ticket=r.ticket,
        replays=r.replays,
    )
    if r.next_hop is not None:
        made.next_hop.CopyFrom(_hop_out(r.next_hop))
    return made


def _hop_out(hop: m.NextHop) -> pb.NextHop:
    return pb.NextHop(address=hop.address, ticket=hop.ticket)


def _resumption_out(r: m.Resumption) -> pb.Resumption:
    return pb.Resumption(trunk_length=r.trunk_length, tip=r.tip)


def _answer_out(a: m.Answer) -> pb.Answer:
    return pb.Answer(
        session=a.session,
        epoch=a.epoch,
        seq=a.seq,
        ids=_array_out(a.ids, "<u4"),
        tokens=_array_out(a.tokens, "<u4"),
        logprobs=_array_out(a.logprobs, "<f4"),
        timings=_timings_out(a.timings),
        alternatives=_array_out(a.alternatives, "<u4"),
    )


def _append_out(a: m.Append) -> pb.Append:
    s = a.settings
    return pb.Append(
        epoch=a.epoch,
        seq=a.seq,
        commit=_array_out(a.commit, "<u4"),
        first_id=a.first_id,
        parents=_array_out(a.parents, "<u4"),
        tokens=_array_out(a.tokens, "<u4"),
        prefill=a.prefill,
        answers=ANSWERS_OUT[a.answers],
        settings=pb.SamplingSettings(
            temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=s.seed, sample=s.sample
        ),
        skipped=np.packbits(a.skipped, bitorder="little").tobytes() if a.skipped.any() else b"",
        hidden=a.hidden,
        timings=_timings_out(a.timings),
        fresh=a.fresh,
        replay=a.replay,
        prefix=a.prefix,
        planes=a.planes,
    )


_OUT: dict[type, tuple[Callable[..., Proto], str, Callable[[Any], Proto]]] = {
    m.Describe: (pb.ControlUp, "describe", lambda d: pb.Describe(version=d.version)),
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
        ),
    ),
    m.Answer: (pb.ControlDown, "answer", _answer_out),
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
    m.Watch: (pb.ControlUp, "watch", lambda w: pb.Watch(version=w.version, everyone=w.everyone)),
    m.Records: (pb.ControlDown, "records", lambda r: pb.Records(sealed=r.sealed)),
    m.DialBack: (pb.ControlUp, "dial_back", lambda d: pb.DialBack(address=d.address)),
    m.DialledBack: (
        pb.ControlDown,
        "dialled_back",
        lambda d: pb.DialledBack(reached=d.reached, why=_clipped(d.why)),
    ),
    m.Manage: (
        pb.ControlUp,
        "manage",
        lambda o: pb.Manage(action=o.action, stamp=o.stamp, signature=o.signature),
    ),
    m.Managed: (pb.ControlDown, "managed", lambda d: pb.Managed(message=_clipped(d.message))),
    m.LeasePort: (pb.ControlUp, "lease_port", lambda r: pb.LeasePort(version=r.version)),
    m.PortLeased: (pb.ControlDown, "port_leased", lambda r: pb.PortLeased(port=r.port, fetch_port=r.fetch_port)),
    m.IncomingConnection: (pb.ControlDown, "incoming_connection", lambda i: pb.IncomingConnection(token=i.token)),
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
