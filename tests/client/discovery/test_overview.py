"""The overview of a swarm, and its pictures, from records and measurements."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import UNKNOWN_WEIGHTS, NodeRecord, NodeState
from treeswarm.protocol.spans import Span, missing_blocks
from treeswarm_client.cli.render.block_map import Scale, draw_block_map
from treeswarm_client.cli.render.status_table import fit_columns, render_status
from treeswarm_client.discovery.overview import ClassView, ModelFilter, Overview, Probe, clean, make_overview

FLOAT32, BFLOAT16 = NumericsClass("01" * 32, "float32"), NumericsClass("01" * 32, "bfloat16")
MODEL, OTHER = "ab" * 32, "cd" * 32


def record(number: int, span: Span, **changes: Any) -> NodeRecord:
    fields: dict[str, Any] = {
        "key": number.to_bytes(32, "big"),
        "generation": 1,
        "expires": 2,
        "state": NodeState.ONLINE,
        "address": f"10.0.0.{number % 250}:4001",
        "pin": "",
        "reachable": True,
        "name": "demo",
        "model": MODEL,
        "numerics": FLOAT32,
        "span": span,
        "blocks": 8,
        "rate": 12_345.0,
        "hop_s": 0.004,
        "free_tokens": 2048,
        "total_tokens": 8192,
        "coordinate": (),
        "software": "treeswarm 1",
    }
    return NodeRecord(**fields | changes)


def drawn(overview: Overview, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as captured:
        console.print(*render_status(overview, width, "swarm:10.0.0.1:4001/…"), sep="\n")
    return captured.get()


def only(overview: Overview) -> ClassView:
    ((served,),) = (model.classes for model in overview.models)
    return served


def test_a_node_without_known_weights_joins_its_likely_class() -> None:
    unread = NumericsClass(UNKNOWN_WEIGHTS, "float32")
    joining = record(2, Span(4, 8), numerics=unread, state=NodeState.JOINING)
    served = only(make_overview([record(1, Span(0, 4)), joining], {}))
    assert served.numerics == FLOAT32
    assert [node.state for node in served.nodes] == [NodeState.ONLINE, NodeState.JOINING]
    assert served.gaps == (Span(4, 8),)
    alone = make_overview([joining], {})
    assert "weights not read yet" in drawn(alone, 100)
    others = make_overview([record(1, Span(0, 4), numerics=BFLOAT16), joining], {})
    assert len(others.models[0].classes) == 2


def test_a_gap_says_what_the_nodes_with_its_blocks_do() -> None:
    head, tail, late = (
        record(1, Span(0, 4)),
        record(2, Span(4, 6)),
        record(3, Span(6, 8), state=NodeState.JOINING),
    )
    overview = make_overview([head, tail, late], {tail.node: Probe(None, "no answer")})
    (model,) = overview.models
    assert model.why_missing == f"{tail.address} with 4:6 does not answer, {late.address} is loading 6:8"
    assert overview.as_dict()["models"][0]["why_missing"] == model.why_missing
    shown = " ".join(drawn(overview, 200).split())
    assert f"no node serves blocks 4:8 ({model.why_missing}): start `swarm-node demo --blocks 4:8" in shown


def test_replicas_and_gaps_count_only_serving_nodes() -> None:
    records = [
        record(1, Span(0, 4)),
        record(2, Span(2, 5)),
        record(3, Span(4, 8), state=NodeState.DRAINING),
        record(4, Span(5, 8), state=NodeState.JOINING),
        record(5, Span(4, 6), state=NodeState.PAUSED),
        record(6, Span(7, 8)),
    ]
    probes = {records[0].node: Probe(0.0123), records[5].node: Probe(None, "nobody answers")}
    overview = make_overview(records, probes)
    served = only(overview)
    assert served.replicas == (1, 1, 2, 2, 1, 0, 0, 0)
    assert served.gaps == (Span(5, 8),)
    assert not overview.covered
    node = served.nodes[0]
    assert (node.latency_ms, node.load, node.silent) == (pytest.approx(12.3), 0.75, False)
    assert [n.serves for n in served.nodes] == [True, True, False, False, False, False]
    shown = " ".join(drawn(overview, 200).split())
    assert "no node serves blocks 5:8 (10.0.0.5:4001 is paused with 4:6, 10.0.0.3:4001 is leaving with 4:8" in shown
    assert ": start `swarm-node demo --blocks 5:8 --registry 'swarm:10.0.0.1:4001/…'`" in shown
    assert "does not answer: nobody answers" in drawn(overview, 120)


def test_a_model_is_covered_by_one_class_not_by_two_halves() -> None:
    halves = [record(1, Span(0, 4)), record(2, Span(4, 8), numerics=BFLOAT16)]
    overview = make_overview(halves, {})
    assert [served.gaps for served in overview.models[0].classes] == [(Span(0, 4),), (Span(4, 8),)]
    assert not overview.covered
    overview = make_overview([*halves, record(3, Span(0, 4), numerics=BFLOAT16)], {})
    assert overview.covered
    assert overview.models[0].classes[0].numerics == BFLOAT16
    assert "blocks 0:8 covered, weakest block has 1 replica\n" in drawn(overview, 80)


def test_a_record_with_other_blocks_is_another_model() -> None:
    records = [record(1, Span(0, 7)), record(2, Span(0, 1), blocks=1)]
    overview = make_overview(records, {})
    assert [(model.blocks, model.covered) for model in overview.models] == [(1, True), (8, False)]
    assert not overview.covered
    records.append(record(3, Span(0, 8), model=OTHER))
    overview = make_overview(records, {}, model_filter=ModelFilter("demo", MODEL, 8), refused={"forged": 2})
    assert overview.refused == {"forged": 2, "other-block-count": 1, "other-model": 1}
    assert [model.blocks for model in overview.models] == [8]
    assert "records not shown: 2 forged, 1 other-block-count, 1 other-model" in drawn(overview, 80)


def test_a_model_without_nodes_is_shown_as_one_gap() -> None:
    overview = make_overview([], {}, model_filter=ModelFilter("demo", MODEL, 8))
    assert not overview.covered
    assert overview.models[0].gaps == (Span(0, 8),)
    assert "no node serves blocks 0:8" in drawn(overview, 80)
    assert not make_overview([], {}).covered
    assert "no node" in drawn(make_overview([], {}), 80)


def test_announced_text_is_neither_control_code_nor_markup() -> None:
    evil = "\x1b[2J\u202e[red]$(reboot)[/red]\n" + "x" * 1000
    overview = make_overview([record(1, Span(0, 4), name=evil, address="h\x1b]0;:1", software=evil)], {})
    text = drawn(overview, 300)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]$(reboot)[/red]" in text
    assert "`swarm-node MODEL --blocks 4:8" in text
    assert len(clean(evil)) < 250


def test_an_overview_converts_to_json() -> None:
    records = [record(1, Span(0, 4)), record(2, Span(4, 8), total_tokens=0)]
    overview = make_overview(records, {records[0].node: Probe(0.5), records[1].node: Probe(None, "gone")})
    as_json = json.loads(json.dumps(overview.as_dict()))
    (served,) = as_json["models"][0]["classes"]
    assert served["replicas"] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert served["gaps"] == as_json["models"][0]["gaps"] == ["4:8"]
    assert [(n["latency_ms"], n["why_silent"], n["load"]) for n in served["nodes"]] == [
        (500.0, None, 0.75),
        (None, "gone", None),
    ]


def test_the_block_map_is_readable_without_colours() -> None:
    records = [
        record(1, Span(0, 3)),
        record(2, Span(2, 5), state=NodeState.DRAINING),
        record(3, Span(5, 8)),
        record(4, Span(5, 7), state=NodeState.JOINING),
    ]
    served = only(make_overview(records, {records[2].node: Probe(None, "gone")}))
    ids = [node.id[:8] for node in served.nodes]
    assert [line.plain for line in draw_block_map(served, 17, ascii_only=True)][:6] == [
        "block 0 2 4 6",
        f"{ids[0][:5]} ###",
        f"{ids[1][:5]}   ddd",
        f"{ids[2][:5]}      jj",
        f"{ids[3][:5]}      ???",
        "repli 111!!!!!",
    ]
    assert draw_block_map(served, 44)[5].plain == "replicas 1   1   1   !!!!!!!!!!!!!!!!!!!!"


def test_a_scaled_block_map_still_shows_every_gap() -> None:
    records = [record(1, Span(0, 137), blocks=200), record(2, Span(138, 200), blocks=200)]
    lines = [line.plain for line in draw_block_map(only(make_overview(records, {})), 60)]
    assert lines[3].count("!") == 1
    assert set(lines[3].partition(" ")[2]) == {"1", "!"}
    assert "a column is 3 or 4 blocks" in "".join(lines)


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[NodeRecord], dict[str, Probe], int]:
    blocks = draw(st.integers(1, 200))
    records = []
    for number in range(draw(st.integers(1, 14))):
        start = draw(st.integers(0, blocks - 1))
        span = Span(start, draw(st.integers(start + 1, blocks)))
        state = draw(st.sampled_from([state for state in NodeState if state is not NodeState.GONE]))
        records.append(record(number, span, blocks=blocks, state=state))
    answers = st.sampled_from([None, Probe(0.01), Probe(None, "gone")])
    probes = {r.node: probe for r in records if (probe := draw(answers)) is not None}
    return records, probes, blocks


@given(swarm=swarms(), width=st.integers(4, 240))
def test_the_block_map_fits_its_width_and_shows_every_gap(
    swarm: tuple[list[NodeRecord], dict[str, Probe], int], width: int
) -> None:
    records, probes, blocks = swarm
    served = only(make_overview(records, probes))
    serving = [
        r.span for r in records if r.state is NodeState.ONLINE and probes.get(r.node, Probe(0.0)).latency_s is not None
    ]
    assert list(served.gaps) == missing_blocks(serving, blocks)
    assert list(served.replicas) == [sum(s.start <= b < s.end for s in serving) for b in range(blocks)]
    lines = draw_block_map(served, width)
    assert all(line.cell_len <= width for line in lines)
    assert ("!" in lines[len(records) + 1].plain) == bool(served.gaps)
    bars = [line.plain.partition(" ")[2].strip() for line in lines[1 : len(records) + 1]]
    assert all(bars)


@given(blocks=st.integers(1, 500), width=st.integers(1, 250))
def test_columns_cover_all_blocks_in_order(blocks: int, width: int) -> None:
    scale = Scale.fit(blocks, width)
    assert [block for index in range(scale.columns) for block in scale.column(index)] == list(range(blocks))
    assert all(len(scale.column(index)) for index in range(scale.columns))
    assert scale.columns * scale.cell <= width


@pytest.mark.parametrize("width", [80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    records = [record(n, Span(n % 7, n % 7 + 1), software="treeswarm 0.2.0") for n in range(40)]
    text = drawn(make_overview(records, {r.node: Probe(0.01) for r in records}), width)
    assert max(map(len, text.splitlines())) <= width
    _, left_out = fit_columns(only(make_overview(records, {})).nodes, width)
    assert bool(left_out) == (width == 80)


def test_columns_for_speculators_and_drivers_are_shown_where_there_are_any() -> None:
    plain = [record(1, Span(0, 1)), record(2, Span(1, 2))]
    tail = replace(plain[1], speculator="autoregressive", agreement=0.53, driver=DriverKind.TAIL)
    views = [only(make_overview(records, {})).nodes for records in (plain, [plain[0], tail])]
    titles = [[column.title for column in fit_columns(nodes, 200)[0]] for nodes in views]
    assert set(titles[1]) - set(titles[0]) == {"proposes", "drives"}
    text = drawn(make_overview([plain[0], tail], {}), 200)
    assert "autoregressive 53%" in text
    shown = [(node.as_dict()["speculator"], node.as_dict()["agreement"], node.as_dict()["driver"]) for node in views[1]]
    assert sorted(shown, key=str) == [("autoregressive", 0.53, "tail"), (None, None, "none")]
