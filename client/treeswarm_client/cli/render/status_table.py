"""Draws the output of `swarm status`: for every model a map, a table of nodes and a summary line.  Pure."""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from treeswarm.errors import MissingBlocks
from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.protocol.records import UNKNOWN_WEIGHTS
from treeswarm.protocol.spans import Span
from treeswarm_client.cli.render.block_map import SHORT_ID, STYLES, draw_block_map, node_condition
from treeswarm_client.discovery.overview import ClassView, ModelView, NodeView, Overview

NARROWEST = 20
# Number of spaces between two columns.
BETWEEN = 2
# Number of gaps that the summary names; the others are counted.
GAPS = 8
NEW_LINE = "\n  "
REASONS = 5
"""Number of silent nodes whose reasons are shown; the others are counted."""
# Nodes choose the name of a model.  It is shown within a command only without characters that a shell interprets.
SAFE_NAME = re.compile(r"[A-Za-z0-9_./-]+")


@dataclass(frozen=True)
class Column:
    """A column of the table.  In a narrow terminal, the columns with the lowest rank are left out first."""

    title: str
    rank: int
    cell: Callable[[NodeView], str]
    justify: Literal["left", "right"] = "right"


def _proposes(node: NodeView) -> str:
    """Return the kind of a node's speculator, and how often its first guess is right if that is known."""
    return f"{node.speculator} {node.agreement:.0%}" if node.speculator and node.agreement else node.speculator


COLUMNS = (
    Column("node", 9, lambda node: node.id[:SHORT_ID], "left"),
    Column("address", 8, lambda node: node.address, "left"),
    Column("blocks", 9, lambda node: str(node.span)),
    Column("state", 9, node_condition, "left"),
    Column("load", 6, lambda node: "-" if node.load is None else f"{node.load:.0%}"),
    Column("ping ms", 7, lambda node: "-" if node.latency_ms is None else f"{node.latency_ms:.1f}"),
    Column("rows/s", 5, lambda node: _abbreviate(node.rate)),
    Column("queue ms", 4, lambda node: f"{node.hop_s * 1e3:.1f}"),
    Column("proposes", 0, _proposes, "left"),
    Column("drives", 1, lambda node: "" if node.driver is DriverKind.NONE else "yes", "left"),
    Column("reachable", 2, lambda node: "yes" if node.reachable else "no", "left"),
    Column("software", 3, lambda node: node.software, "left"),
)


def render_status(
    overview: Overview, width: int, registry: str, *, ascii_only: bool = False, summary_first: bool = False
) -> list[RenderableType]:
    """Return the output line by line.  Commands that it shows name the `registry`, so that they can be pasted."""
    width = max(width, NARROWEST)
    lines: list[RenderableType] = []
    for model in overview.models:
        parts = [_class(model, served, width, registry, ascii_only=ascii_only) for served in model.classes]
        for body, summary in parts or [([_heading(model, None)], _summary(model, model.gaps, 0, width, registry))]:
            lines += [body[0], summary, *body[1:], ""] if summary_first else [*body, summary, ""]
    if not overview.models:
        command = f"swarm-node MODEL --registry {shlex.quote(registry)}"
        lines += [Text(f"no node announces itself here: start `{command}`", "bold red")]
    if footnotes := _footnotes(overview):
        return [*lines, *footnotes]
    return lines[:-1] if lines[-1] == "" else lines


def _class(
    model: ModelView, served: ClassView, width: int, registry: str, *, ascii_only: bool
) -> tuple[list[RenderableType], RenderableType]:
    body = [
        _heading(model, served),
        *draw_block_map(served, width, ascii_only=ascii_only),
        "",
        _table(served.nodes, width),
    ]
    return [*body, ""], _summary(model, served.gaps, served.weakest, width, registry)


def _heading(model: ModelView, served: ClassView | None) -> Text:
    text = Text.assemble((model.name, "bold"), f"  {model.blocks} blocks", f"  config {model.digest[:SHORT_ID]}")
    if served is not None:
        weights = served.numerics.weights
        weights_text = f"weights {weights[:SHORT_ID]}" if weights != UNKNOWN_WEIGHTS else "weights not read yet"
        text.append(f"  {served.numerics.dtype}  {weights_text}")
        if served.numerics.quantization not in ("", "none"):
            text.append(f"  quantization {served.numerics.quantization}")
        if served.numerics.activations:
            text.append(f"  activations {served.numerics.activations}")
        text.append(f"  {len(served.nodes)} node{'s' if len(served.nodes) > 1 else ''}")
    return text


def _table(nodes: Sequence[NodeView], width: int) -> RenderableType:
    columns, left_out = fit_columns(nodes, width)
    caption = f"left out in this narrow terminal: {', '.join(left_out)}" if left_out else None
    table = Table(box=None, pad_edge=False, padding=(0, BETWEEN, 0, 0), caption=caption, caption_justify="left")
    for column in columns:
        table.add_column(Text(column.title), justify=column.justify, overflow="fold")
    for node in nodes:
        style = STYLES.get(node_condition(node), "")
        table.add_row(*(Text(column.cell(node), style if column.title == "state" else "") for column in columns))
    return table


def fit_columns(nodes: Sequence[NodeView], width: int) -> tuple[list[Column], list[str]]:
    """Return the columns that fit into `width`, in order, and the titles of the others.

    A column that is empty for every node is neither.
    """
    columns, left_out = [column for column in COLUMNS if any(map(column.cell, nodes))], []
    while len(columns) > 1 and sum(_width(column, nodes) + BETWEEN for column in columns) - BETWEEN > width:
        least = min(columns, key=lambda column: column.rank)
        columns.remove(least)
        left_out.append(least.title)
    return columns, left_out


def _width(column: Column, nodes: Sequence[NodeView]) -> int:
    return max(Text(text).cell_len for text in (column.title, *map(column.cell, nodes)))


def _summary(model: ModelView, gaps: Sequence[Span], weakest: int, width: int, registry: str) -> Text:
    if not gaps:
        replicas = f"{weakest} replica{'s' if weakest > 1 else ''}"
        return Text(f"blocks {Span(0, model.blocks)} covered, weakest block has {replicas}", "bold green")
    name = model.name if SAFE_NAME.fullmatch(model.name) else "MODEL"
    why = f" ({model.why_missing})" if model.why_missing else ""
    problem = f"{MissingBlocks.phrase(gaps, most=GAPS)}{why}:"
    command = f"start `swarm-node {name} --blocks {gaps[0]} --registry {shlex.quote(registry)}`"
    # The command gets a line of its own if it would be wrapped, so that it can be copied.
    return Text(f"{problem}{' ' if len(problem) + 1 + len(command) <= width else NEW_LINE}{command}", "bold red")


def _footnotes(overview: Overview) -> list[RenderableType]:
    reasons = [
        f"{node.id[:SHORT_ID]} at {node.address} does not answer: {node.probe.reason}"
        for model in overview.models
        for served in model.classes
        for node in served.nodes
        if node.probe is not None and node.silent
    ]
    reasons += [f"{address} sends no records: {reason}" for address, reason in overview.silent.items()]
    notes = reasons[:REASONS]
    notes += [f"and {len(reasons) - REASONS} more do not answer"] if len(reasons) > REASONS else []
    if overview.refused:
        counts = ", ".join(f"{count} {reason}" for reason, count in overview.refused.items())
        notes.append(f"records not shown: {counts}")
    return [Text(note, "dim") for note in notes]


def _abbreviate(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}" if number else "-"
