"""Draws the table of `swarm models`: one line for every version of every model.  Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from treeswarm_client.discovery.overview import ClassView, ModelView, Overview

GAPS = 4
UNKNOWN = "-"


@dataclass(frozen=True)
class Room:
    """Room in tokens of sessions at the block that has the least."""

    free: int
    total: int


def room_of(served: ClassView) -> Room:
    """Return the least room of all blocks, because a session needs room at every block."""
    serving = [node for node in served.nodes if node.serves]
    at_blocks = [
        [node for node in serving if node.span.start <= block < node.span.end] for block in range(served.blocks)
    ]
    return Room(
        min(sum(node.free_tokens for node in nodes) for nodes in at_blocks),
        min(sum(node.total_tokens for node in nodes) for nodes in at_blocks),
    )


def render_models(overview: Overview, contexts: Mapping[str, int]) -> list[RenderableType]:
    """Return the table and notes below it; `contexts` are context lengths in tokens, by config digest."""
    if not overview.models:
        return [
            Text("no node announces a model here: start one with `swarm-node MODEL`", "bold red"),
            *_notes(overview),
        ]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("model", "blocks", "served", "dtype", "quantization", "nodes", "context", "free room"):
        left = title in ("model", "served", "dtype", "quantization")
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    for model in overview.models:
        for served in model.classes:
            table.add_row(*_row(model, served, contexts.get(model.digest)))
    return [table, *_notes(overview)]


def models_as_dict(overview: Overview, contexts: Mapping[str, int]) -> dict[str, Any]:
    """Return the same as an object for JSON."""
    return {"models": [_model(model, contexts.get(model.digest)) for model in overview.models]}


def _row(model: ModelView, served: ClassView, context: int | None) -> list[Text]:
    gaps = ", ".join(map(str, served.gaps[:GAPS])) + (" …" if len(served.gaps) > GAPS else "")
    state = Text(f"missing {gaps}", "red") if served.gaps else Text("complete", "green")
    numerics, room = served.numerics, room_of(served)
    quantization = (numerics.quantization or "none") + (
        f", {numerics.activations} activations" if numerics.activations else ""
    )
    cells = [numerics.dtype, quantization, str(sum(node.serves for node in served.nodes))]
    cells += [UNKNOWN if context is None else str(context), f"{room.free} of {room.total}"]
    return [Text(model.name), Text(str(model.blocks)), state, *map(Text, cells)]


def _model(model: ModelView, context: int | None) -> dict[str, Any]:
    return {
        "name": model.name,
        "model": model.digest,
        "blocks": model.blocks,
        "covered": model.covered,
        "context_tokens": context,
        "classes": [_class(served) for served in model.classes],
    }


def _class(served: ClassView) -> dict[str, Any]:
    room = room_of(served)
    return {
        "weights": served.numerics.weights,
        "dtype": served.numerics.dtype,
        "quantization": served.numerics.quantization or "none",
        "activations": served.numerics.activations or "native",
        "covered": not served.gaps,
        "gaps": [str(gap) for gap in served.gaps],
        "nodes": sum(node.serves for node in served.nodes),
        "free_tokens": room.free,
        "total_tokens": room.total,
    }


def _notes(overview: Overview) -> list[RenderableType]:
    notes = [f"{address} sends no records: {reason}" for address, reason in overview.silent.items()]
    if overview.models and not overview.covered:
        notes.append("`swarm status` shows which nodes serve which blocks, and how to fill the gaps")
    return [Text(note, "dim") for note in notes]
