"""Tests of the codec: decoding reverses encoding, and malformed bytes raise Malformed and nothing else."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.random_rules import rules_requests

from treeswarm.errors import Malformed
from treeswarm.protocol import drive_messages as d
from treeswarm.protocol import messages as m
from treeswarm.protocol import node_messages as n
from treeswarm.protocol.prefix import MAX_PREFIX_UNITS, PREFIX_TOKENS, Prefix
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.protocol.tap_sums import MAX_TAPS, TapRequest, TapSums
from treeswarm.wire import treeswarm_pb2 as pb
from treeswarm.wire.codec import decode_control_down, decode_control_up, decode_link_down, decode_link_up, encode

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
ids16 = st.binary(min_size=16, max_size=16)
short = st.text(max_size=40)
node_ids = st.text("0123456789abcdef", max_size=64)
spans = st.tuples(st.integers(0, 100), st.integers(1, 100)).map(lambda pair: Span(pair[0], pair[0] + pair[1]))
numerics = st.builds(m.NumericsClass, short, st.sampled_from(["float32", "bfloat16", "float16"]), st.text(max_size=16))
timings = st.lists(st.builds(m.HopTiming, u32, u32, u32, u32), max_size=4).map(tuple)
sampling = st.builds(
    SamplingSettings, st.floats(0, 100), st.integers(0, 2**31 - 1), st.floats(0.01, 1.0), u64, st.integers(0, 2**32 - 1)
)


def arrays(count: int) -> st.SearchStrategy[Any]:
    return st.lists(u32, min_size=count, max_size=count).map(lambda values: np.array(values, np.uint32))


tap_requests = st.none() | st.builds(TapRequest, st.binary(min_size=8, max_size=8).map(bytes.hex), st.integers(0, 9))


@st.composite
def tap_sums(draw: st.DrawFn, skipped: list[bool]) -> TapSums | None:
    rows = np.array([draw(st.booleans()) and not dead for dead in skipped], np.bool_)
    blocks = draw(st.lists(st.integers(0, 99), min_size=1, max_size=MAX_TAPS, unique=True).map(sorted))
    size = draw(st.integers(1, 5))
    return TapSums(rows, tuple(blocks), bytes(size * int(rows.sum()))) if rows.any() else None


@st.composite
def appends(draw: st.DrawFn) -> m.Append:
    rows = draw(st.integers(0, 20))
    skipped = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return m.Append(
        epoch=draw(u32),
        seq=draw(u32),
        commit=draw(arrays(draw(st.integers(0, 5)))),
        first_id=draw(st.integers(0, 2**32 - 1 - rows)),
        parents=draw(arrays(rows)),
        tokens=draw(arrays(rows)),
        prefill=(prefill := draw(st.booleans())),
        scored=draw(arrays(draw(st.integers(0, rows)))) if prefill else m.no_tokens(),
        answers=draw(st.sampled_from(m.Answers)),
        settings=draw(sampling),
        skipped=np.array(skipped, np.bool_),
        hidden=(hidden := draw(st.binary(max_size=50))),
        timings=draw(timings),
        fresh=draw(st.booleans()),
        prefix=draw(st.integers(0, m.MAX_TRUNK)),
        planes=draw(st.sampled_from([0, 1, 2, 4])) if hidden else 0,
        tap_sums=draw(tap_sums(skipped)),
    )


@st.composite
def answers(draw: st.DrawFn) -> m.Answer:
    rows = draw(st.integers(0, 20))
    logprobs = np.array(draw(st.lists(st.floats(max_value=0, width=32), min_size=rows, max_size=rows)), np.float32)
    width = draw(st.integers(0, m.MAX_ALTERNATIVES)) if rows else 0
    best = draw(arrays(rows * width)).reshape(rows, width) if width else m.no_alternatives()
    best_logprobs = -best.astype(np.float32) if draw(st.booleans()) else m.no_logprobs()
    scored = m.ScoredRows(logprobs, best, best_logprobs) if draw(st.booleans()) else None
    return m.Answer(
        draw(ids16), draw(u32), draw(u32), draw(arrays(rows)), draw(arrays(rows)), logprobs, draw(timings), best,
        best_logprobs, scored,
    )  # fmt: skip


@st.composite
def drives(draw: st.DrawFn) -> d.Drive:
    return d.Drive(
        version=draw(u32),
        text=draw(ids16),
        numerics=draw(numerics),
        prompt=draw(arrays(draw(st.integers(1, 9)))),
        settings=draw(sampling),
        max_new_tokens=draw(st.integers(1, m.MAX_TRUNK)),
        stop_ids=draw(arrays(draw(st.integers(0, 9)))),
        tree_size=draw(st.none() | st.integers(0, m.MAX_CROWN)),
        prefix_secret=draw(st.just(b"") | ids16),
        rules=draw(st.none() | rules_requests),
    )


@st.composite
def driven_tokens(draw: st.DrawFn) -> d.DrivenTokens:
    count, drafted = draw(st.integers(0, 9)), draw(u32)
    micros = [draw(st.integers(0, d.MAX_TRAVERSAL_US)) for _ in range(4)]
    accepted, missed = draw(st.integers(0, drafted)), draw(st.booleans())
    return d.DrivenTokens(
        draw(ids16),
        draw(arrays(count)),
        np.array(draw(st.lists(st.floats(max_value=0, width=32), min_size=count, max_size=count)), np.float32),
        d.DrivenTraversal(*micros, draw(u32), drafted, accepted, missed, draw(st.integers(0, d.MAX_REPAIRS))),
        draw(st.lists(st.builds(d.DrivenHop, node_ids, short, spans), max_size=3).map(tuple)),
        draw(st.integers(0, m.MAX_TRUNK)),
    )


@st.composite
def proposals(draw: st.DrawFn) -> m.Proposal:
    rows = draw(st.integers(0, 20))
    parents = np.array([draw(st.integers(0, i)) for i in range(rows)], np.uint32)
    scores = sorted(draw(st.lists(st.floats(-100, 0, width=32), min_size=rows, max_size=rows)), reverse=True)
    tokens = np.arange(rows, dtype=np.uint32)
    return m.Proposal(draw(ids16), draw(u32), draw(u32), draw(u32), parents, tokens, np.array(scores, np.float32))


hops = st.none() | st.builds(m.NextHop, short, ids16)
rooms = st.integers(1, m.MAX_CROWN)
prefixes = st.none() | st.builds(Prefix, ids16, st.lists(ids16, max_size=5).map(tuple))
opens = st.builds(
    m.Open,
    u32,
    ids16,
    u32,
    spans,
    numerics,
    st.integers(1, m.MAX_TRUNK),
    rooms,
    ids16,
    hops,
    prefix=prefixes,
    alternatives=st.integers(0, m.MAX_ALTERNATIVES),
    proposal_nodes=st.integers(0, m.MAX_PROPOSAL),
    taps=tap_requests,
    rules=st.none() | rules_requests,
    alternative_logprobs=st.booleans(),
)
descriptions = st.builds(
    m.Description,
    version=u32,
    software=short,
    span=st.just(Span(2, 4)),
    blocks=st.integers(4, 999),
    vocab_size=st.integers(1, 2**31),
    hidden_size=st.integers(1, 2**20),
    max_positions=st.integers(1, 2**31),
    config=short,
    numerics=numerics,
    attention=short,
    trunk_free=u64,
    frames=u64,
    forwards=u64,
    forward_sessions=u64,
    prefix_hits=u64,
    prefix_tokens=u64,
    shared_pages=u64,
    skipped_rows=u64,
)
profiles = st.dictionaries(
    st.integers(1, m.MAX_ROWS), st.integers(1, m.MAX_PROFILE_US), max_size=m.MAX_PROFILE_POINTS
).map(lambda points: tuple(sorted(points.items())))
UP = st.one_of(
    st.builds(m.Describe, u32),
    opens,
    st.builds(m.Hint, ids16, u32, u32),
    st.builds(m.Ping, u64),
    st.builds(m.Close, ids16),
    st.builds(n.FindSwarm, u32),
    drives(),
)
DOWN = st.one_of(
    descriptions,
    st.builds(
        m.Opened,
        ids16,
        u32,
        u32,
        profiles,
        st.integers(0, m.MAX_TRUNK),
        st.integers(0, m.MAX_PROPOSAL),
        st.just(b"") | ids16,
    ),
    answers(),
    proposals(),
    st.builds(m.Pong, u64),
    st.builds(n.SwarmFound, short),
    driven_tokens(),
    st.builds(m.Fault, ids16, st.sampled_from(m.FaultCode), short, st.booleans()),
)
LINK = st.one_of(
    st.builds(m.LinkHello, u32, ids16, u32, ids16, warm_up=st.binary(max_size=9), packs=st.booleans()), appends()
)
BACK = st.builds(m.LinkWelcome, st.booleans())
DECODERS = (decode_control_up, decode_control_down, decode_link_up, decode_link_down)


def equal(left: Any, right: Any) -> bool:
    """Compare messages field by field; NaN equals NaN."""
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    if is_dataclass(left):
        return type(left) is type(right) and all(
            equal(getattr(left, f.name), getattr(right, f.name)) for f in fields(left)
        )
    return bool(left == right)


@settings(max_examples=150, deadline=None)
@given(up=UP, down=DOWN, link=LINK, back=BACK)
def test_decoding_reverses_encoding_for_every_message(
    up: m.Message, down: m.Message, link: m.Message, back: m.Message
) -> None:
    for message, decode in zip((up, down, link, back), DECODERS, strict=True):
        assert equal(message, decode(encode(message)))


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=200),
    message=st.one_of(UP, DOWN, LINK, BACK),
    place=st.integers(0, 10_000),
    byte=st.integers(0, 255),
)
def test_hostile_bytes_raise_only_malformed(data: bytes, message: m.Message, place: int, byte: int) -> None:
    valid = bytearray(encode(message))
    if valid:
        valid[place % len(valid)] = byte
    for decode in DECODERS:
        for candidate in (data, bytes(valid), bytes(valid[: place % (len(valid) + 1)])):
            try:
                decode(candidate)
            except Malformed as error:
                assert str(error)


def drive_bytes(**changes: Any) -> bytes:
    """Return the bytes of a Drive with the given fields, and valid defaults for the rest."""
    fields_of_drive: dict[str, Any] = {
        "text": bytes(16),
        "numerics": pb.NumericsClass(dtype="float32"),
        "prompt": bytes(4),
        "settings": pb.SamplingSettings(top_p=1.0),
        "max_new_tokens": 1,
        "auto_tree": True,
    }
    return bytes(pb.ControlUp(drive=pb.Drive(**{**fields_of_drive, **changes})).SerializeToString())


def driven_bytes(**changes: Any) -> bytes:
    """Return the bytes of DrivenTokens with the given fields."""
    return bytes(pb.ControlDown(driven_tokens=pb.DrivenTokens(text=bytes(16), **changes)).SerializeToString())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"text": b"short"}, "text: 5 bytes"),
        ({"prompt": b""}, "prompt: it is empty"),
        ({"prompt": bytes(4 * (d.MAX_DRIVEN_PROMPT + 1))}, "prompt: 524289 elements"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop_ids": bytes(4 * 257)}, "stop_ids: 257 elements"),
        ({"auto_tree": False, "tree_size": 5000}, "tree_size"),
        ({"prefix_secret": b"x"}, "prefix_secret: 1 bytes"),
        ({"settings": pb.SamplingSettings(temperature=-1.0, top_p=1.0)}, "temperature"),
    ],
)
def test_a_request_to_drive_out_of_bounds_is_malformed(changes: dict[str, Any], field: str) -> None:
    assert decode_control_up(drive_bytes())
    with pytest.raises(Malformed, match=field):
        decode_control_up(drive_bytes(**changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tokens": bytes(8), "logprobs": bytes(4)}, "tokens and logprobs differ"),
        ({"tokens": bytes(4 * 5000), "logprobs": bytes(4 * 5000)}, "at most 4096"),
        ({"hops": [pb.DrivenHop(span=pb.Span(start=0, end=1))] * 300}, "300 hops"),
        ({"hops": [pb.DrivenHop(node="0" * 65, span=pb.Span(start=0, end=1))]}, "hops.node"),
        ({"traversal": pb.DrivenTraversal(seconds_us=2**63)}, "seconds_us"),
        ({"traversal": pb.DrivenTraversal(drafted=1, accepted=2)}, "accepted"),
        ({"traversal": pb.DrivenTraversal(repairs=2**31)}, "repairs"),
    ],
)
def test_driven_tokens_out_of_bounds_are_malformed(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(Malformed, match=field):
        decode_control_down(driven_bytes(**changes))


def append_bytes(**fields_of_append: Any) -> bytes:
    """Return the bytes of an Append with the given fields, and valid defaults for the rest."""
    defaults = {"settings": pb.SamplingSettings(top_p=1.0), "first_id": 1}
    return bytes(pb.LinkUp(append=pb.Append(**{**defaults, **fields_of_append})).SerializeToString())


ROWS4 = np.zeros(4, "<u4").tobytes()


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (append_bytes(tokens=ROWS4), "parents"),
        (append_bytes(tokens=b"abc"), "tokens"),
        (append_bytes(tokens=bytes(4 * 5000), parents=bytes(4 * 5000)), "4096"),
        (append_bytes(tokens=bytes(4_000_000), parents=bytes(100)), "4096"),
        (append_bytes(tokens=ROWS4, parents=ROWS4, first_id=2**32 - 2), "32 bits"),
        (append_bytes(tokens=ROWS4, parents=ROWS4, skipped=b"\x00\x00"), "skipped"),
        (append_bytes(answers=9), "answers"),
        (append_bytes(tokens=ROWS4, parents=ROWS4, scored=ROWS4), "scored"),
        (append_bytes(tokens=ROWS4, parents=ROWS4, scored=bytes(20), prefill=True), "scored"),
        (append_bytes(planes=3, hidden=b"packed"), "planes: values of 3"),
        (append_bytes(planes=2), "planes: there are no rows"),
        (append_bytes(settings=pb.SamplingSettings(temperature=float("nan"), top_p=1)), "temperature"),
        (append_bytes(settings=pb.SamplingSettings(top_p=0)), "top_p"),
        (append_bytes(timings=[pb.HopTiming()] * 300), "timings"),
        (pb.LinkUp(hello=pb.LinkHello(session=b"short")).SerializeToString(), "session"),
        (b"", "without a message"),
        (bytes(m.MAX_MESSAGE_BYTES + 1), "limit"),
    ],
    ids=range(17),
)
def test_error_names_the_field_that_is_out_of_bounds(data: bytes, field: str) -> None:
    with pytest.raises(Malformed, match=field):
        decode_link_up(data)


@pytest.mark.parametrize("count", [1, 3, 5, 42], ids=["too few", "uneven", "more uneven", "21 per row"])
def test_uneven_alternatives_are_malformed(count: int) -> None:
    answer = pb.Answer(session=bytes(16), ids=ROWS4[:8], tokens=ROWS4[:8], logprobs=ROWS4[:8])
    answer.alternatives = bytes(4 * count)
    with pytest.raises(Malformed, match="alternatives"):
        decode_control_down(pb.ControlDown(answer=answer).SerializeToString())


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), 0.01])
@pytest.mark.parametrize("kind", ["answer", "scored", "alternatives", "driven"])
def test_values_that_are_no_log_probabilities_are_malformed(kind: str, logprob: float) -> None:
    good, bad, row = (
        np.array([-1.0], "<f4").tobytes(),
        np.array([logprob], "<f4").tobytes(),
        np.array([1], "<u4").tobytes(),
    )
    answer = pb.Answer(session=bytes(16), ids=row, tokens=row, logprobs=bad if kind == "answer" else good)
    if kind == "scored":
        answer.scored.logprobs = bad
    if kind == "alternatives":
        answer.alternatives, answer.alternative_logprobs = row, bad
    message = pb.ControlDown(answer=answer)
    if kind == "driven":
        message = pb.ControlDown(driven_tokens=pb.DrivenTokens(text=bytes(16), tokens=row, logprobs=bad))
    with pytest.raises(Malformed, match="a log-probability is above 0 or not a number"):
        decode_control_down(message.SerializeToString())


def test_alternatives_without_rows_are_malformed() -> None:
    answer = pb.Answer(session=bytes(16), alternatives=ROWS4)
    with pytest.raises(Malformed, match="alternatives"):
        decode_control_down(pb.ControlDown(answer=answer).SerializeToString())


def test_open_with_too_many_alternatives_is_malformed() -> None:
    request = m.Open(1, bytes(16), 0, Span(0, 1), m.NumericsClass("w", "float32"), 1, 1, bytes(16), None)
    assert decode_control_up(encode(replace(request, alternatives=m.MAX_ALTERNATIVES)))
    with pytest.raises(Malformed, match="alternatives"):
        decode_control_up(encode(replace(request, alternatives=m.MAX_ALTERNATIVES + 1)))


def open_bytes(**changes: Any) -> bytes:
    """Return the bytes of an Open with the given fields, and valid defaults for the rest."""
    fields_of_open: dict[str, Any] = {
        "session": bytes(16),
        "ticket": bytes(16),
        "span": pb.Span(start=0, end=1),
        "numerics": pb.NumericsClass(dtype="float32"),
        "trunk_room": 1,
        "crown_room": 1,
    }
    return bytes(pb.ControlUp(open=pb.Open(**{**fields_of_open, **changes})).SerializeToString())


@pytest.mark.parametrize(
    ("scope", "digests", "field"),
    [
        (bytes(15), b"", "prefix_scope: 15 bytes"),
        (b"", bytes(16), "prefix_scope: 0 bytes"),
        (bytes(16), bytes(17), "prefix_digests: 17 bytes"),
        (bytes(16), bytes(16 * (MAX_PREFIX_UNITS + 1)), "prefix_digests: 4097"),
    ],
)
def test_prefix_out_of_bounds_is_malformed(scope: bytes, digests: bytes, field: str) -> None:
    with pytest.raises(Malformed, match=field):
        decode_control_up(open_bytes(prefix_scope=scope, prefix_digests=digests))
    valid = decode_control_up(open_bytes(prefix_scope=bytes(16), prefix_digests=bytes(16 * MAX_PREFIX_UNITS)))
    assert isinstance(valid, m.Open)
    assert valid.prefix is not None
    assert valid.prefix.rows == MAX_PREFIX_UNITS * PREFIX_TOKENS


@pytest.mark.parametrize(
    ("down", "data"),
    [
        (True, pb.ControlDown(opened=pb.Opened(session=bytes(16), prefix_rows=m.MAX_TRUNK + 1)).SerializeToString()),
        (False, append_bytes(prefix=m.MAX_TRUNK + 1)),
    ],
)
def test_prefix_longer_than_a_trunk_is_malformed(down: bool, data: bytes) -> None:
    with pytest.raises(Malformed, match="prefix"):
        (decode_control_down if down else decode_link_up)(data)


def test_decoded_arrays_are_read_only() -> None:
    append = decode_link_up(append_bytes(tokens=ROWS4, parents=ROWS4))
    assert isinstance(append, m.Append)
    with pytest.raises(ValueError, match="read-only"):
        append.tokens[0] = 1


@pytest.mark.parametrize("text", ["x" * 9000, "é" * 4000, "a path \udcff of no encoding"])
def test_long_or_invalid_fault_messages_are_shortened(text: str) -> None:
    fault = decode_control_down(encode(m.Fault(b"", m.FaultCode.INTERNAL, text, True)))
    assert isinstance(fault, m.Fault)
    assert fault.message[:7] == text[:7]
    assert len(fault.message.encode()) <= m.MAX_TEXT


def test_text_limit_counts_bytes_and_encoding_is_checked() -> None:
    with pytest.raises(Malformed, match=r"message: .* bytes"):
        decode_control_down(pb.ControlDown(fault=pb.Fault(message="é" * 3000)).SerializeToString())
    valid = pb.ControlDown(fault=pb.Fault(message="abcdefg")).SerializeToString()
    with pytest.raises(Malformed, match="no ControlDown"):
        decode_control_down(valid.replace(b"abc", b"\xff\xfe\xfd"))


TOO_MANY_POINTS = [(rows, 1) for rows in range(1, 18)]


@pytest.mark.parametrize(
    "points",
    [[(2, 5), (2, 6)], [(9, 5), (3, 6)], [(0, 5)], [(5000, 5)], [(1, 0)], [(1, 2**32 - 1)], TOO_MANY_POINTS],
)
def test_impossible_latency_profile_is_malformed(points: list[tuple[int, int]]) -> None:
    profile = [pb.ProfilePoint(rows=rows, microseconds=micros) for rows, micros in points]
    opened = pb.ControlDown(opened=pb.Opened(session=bytes(16), profile=profile))
    with pytest.raises(Malformed, match="profile"):
        decode_control_down(opened.SerializeToString())


def test_a_report_of_lost_nodes_has_a_limit() -> None:
    report = m.ReportLost(tuple(f"{number:032x}" for number in range(m.MAX_LOST)))
    assert decode_control_up(encode(report)) == report
    with pytest.raises(Malformed, match="65 nodes, at most 64"):
        decode_control_up(encode(m.ReportLost((*report.nodes, "0" * 32))))
    with pytest.raises(Malformed, match="at most 64"):
        decode_control_up(encode(m.ReportLost(("0" * 65,))))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"parents": [0, 2]}, "a node comes before its parent"),
        ({"scores": [-2.0, -1.0]}, "not finite, above 0 or rising"),
        ({"scores": [0.5, 0.0]}, "not finite, above 0 or rising"),
        ({"scores": [0.0, float("nan")]}, "not finite, above 0 or rising"),
        ({"tokens": [7, 7]}, "two siblings have the same token"),
        ({"tokens": [7]}, "differ in length"),
        ({"parents": [0] * 300, "tokens": list(range(300)), "scores": [0.0] * 300}, "at most 256"),
    ],
)
def test_a_proposal_that_is_no_tree_is_malformed(changes: dict[str, list[float]], problem: str) -> None:
    values: dict[str, list[float]] = {"parents": [0, 0], "tokens": [7, 8], "scores": [-1.0, -2.0], **changes}
    packed = {
        name: np.array(value, np.float32 if name == "scores" else np.uint32).tobytes() for name, value in values.items()
    }
    data = pb.ControlDown(proposal=pb.Proposal(session=bytes(16), **packed)).SerializeToString()
    with pytest.raises(Malformed, match=problem):
        decode_control_down(data)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rows": b"\0"}, "no row has a sum"),
        ({"rows": b"\3\0"}, "2 bytes for 3 rows"),
        ({"rows": b"\6"}, "a row that is skipped has a sum"),
        ({"blocks": []}, "0 blocks"),
        ({"blocks": range(17)}, "17 blocks"),
        ({"blocks": [4, 2]}, "blocks do not rise"),
        ({"blocks": [1 << 20]}, "is not between"),
        ({"data": b""}, "0 bytes cannot be divided evenly among 2 rows"),
        ({"data": b"abc"}, "3 bytes cannot be divided evenly among 2 rows"),
    ],
)
def test_sums_of_taps_that_fit_no_rows_are_malformed(changes: dict[str, Any], problem: str) -> None:
    sums = pb.TapSums(**{"rows": b"\3", "blocks": [2, 4], "data": bytes(8), **changes})
    tokens, settings = np.zeros(3, np.uint32).tobytes(), pb.SamplingSettings(top_p=1)
    append = pb.Append(parents=tokens, tokens=tokens, settings=settings, skipped=b"\4", tap_sums=sums)
    with pytest.raises(Malformed, match=problem):
        decode_link_up(pb.LinkUp(append=append).SerializeToString())


@pytest.mark.parametrize("head", [b"", bytes(7), bytes(9)])
def test_a_head_without_a_digest_is_malformed(head: bytes) -> None:
    taps = TapRequest(head.hex())
    resume = m.Resume(1, bytes(16), 1, m.Resumption(1, 1), bytes(16), None, replays=False, taps=taps)
    with pytest.raises(Malformed, match=r"taps\.head"):
        decode_control_up(encode(resume))
