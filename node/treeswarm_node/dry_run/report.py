"""Write an appraisal as text for people, and as data for programs.  Pure."""

import textwrap
from dataclasses import asdict
from typing import Any

from treeswarm.programs.units import format_bytes
from treeswarm_node.dry_run.appraisal import Appraisal, Sizes
from treeswarm_node.dry_run.node_plan import NodePlan

# Width of the labels, and of a line: the table needs that many columns.
INDENT, SCREEN = 15, 100
# Number of spans that are listed; a model on more nodes shows the first of them.
LISTED_SPANS = 6
PROOF = (
    "before it serves, a node compares its layers, with the weights that it loaded, with transformers' own on a tree "
    "of tokens, and stops if they differ"
)
TESTED = {
    "exact": "a tiny random checkpoint of this type computes exactly what transformers computes",
    "refused": "a tiny random checkpoint of this type was refused when it was checked",
    "open": "a tiny random checkpoint of this type is not exact yet, so a node may refuse it",
    "untested": "this type is not among those that are tested",
}


def as_text(appraisal: Appraisal) -> str:
    """Return the report for a terminal."""
    title = f"{appraisal.model}, a model of type {appraisal.model_type}{_inner_type(appraisal)}"
    lines = [textwrap.fill(title, SCREEN, break_long_words=False, break_on_hyphens=False)]
    lines.append(_line("can be hosted", _verdict(appraisal)))
    tested = TESTED[appraisal.test.result] + (f": {appraisal.test.reason}" if appraisal.test.reason else "")
    lines.append(_line("in our tests", tested))
    if not appraisal.refusal:
        lines.append(_line("proof", PROOF))
    lines.append(_line("weights", appraisal.weights))
    if appraisal.source:
        lines.append(_line("read from", appraisal.source))
    if appraisal.sizes is not None:
        lines += _size_lines(appraisal.sizes)
    return "\n".join(lines)


def as_dict(appraisal: Appraisal) -> dict[str, Any]:
    """Return the report as one JSON object, whose keys are a promise to programs."""
    sizes = appraisal.sizes
    report: dict[str, Any] = {
        "model": appraisal.model,
        "model_type": appraisal.model_type,
        "text_type": appraisal.text_type,
        "can_start": appraisal.can_start,
        "refusal": appraisal.refusal,
        "tested": asdict(appraisal.test),
        "weights": appraisal.weights,
        "read_from": appraisal.source,
    }
    if sizes is None:
        return report
    return report | {
        "blocks": sizes.shape.blocks,
        "context": sizes.shape.max_positions,
        "parameters": sizes.parameters,
        "published": asdict(sizes.published) if sizes.published else None,
        "kv_rows": list(sizes.kv_rows),
        "kv_tokens": sizes.room.kv_tokens,
        "memory": sizes.room.memory,
        "device": sizes.device or None,
        "formats": [_plan_as_dict(plan, sizes) for plan in sizes.plans],
    }


def _plan_as_dict(plan: NodePlan, sizes: Sizes) -> dict[str, Any]:
    footprint = plan.footprint
    return {
        "dtype": plan.format.dtype,
        "quantization": plan.format.quantization,
        "holds_codes": plan.format.holds_codes,
        "chosen": plan.format == sizes.chosen,
        "block_bytes": footprint.block,
        "ends_bytes": footprint.ends.whole,
        "head_bytes": footprint.ends.head,
        "tail_bytes": footprint.ends.tail,
        "kv_bytes": footprint.kv_row,
        "blocks_per_node": plan.fit,
        "blocks_at_head": plan.limits.head,
        "blocks_at_tail": plan.limits.tail,
        "peak_bytes": plan.peak,
        "refusal": plan.refusal,
        "nodes": len(plan.spans),
        "nodes_choosing": plan.nodes_choosing,
        "spans": [str(span) for span in plan.spans],
    }


def _inner_type(appraisal: Appraisal) -> str:
    if appraisal.text_type == appraisal.model_type:
        return ""
    return f": the text part of a multimodal model ({appraisal.text_type}) is hosted"


def _verdict(appraisal: Appraisal) -> str:
    if appraisal.refusal:
        return f"no: {appraisal.refusal}"
    likely = {"exact": "yes", "refused": "no, by our tests", "open": "not certain", "untested": "not certain"}
    return f"{likely[appraisal.test.result]}; its config{_headers(appraisal)} and modules are accepted"


def _headers(appraisal: Appraisal) -> str:
    return ", headers" if appraisal.sizes and appraisal.sizes.published else ""


def _size_lines(sizes: Sizes) -> list[str]:
    shape, plan = sizes.shape, sizes.chosen_plan
    size = f"{shape.blocks} blocks, {_count(sizes.parameters)} parameters, context {shape.max_positions} tokens"
    if sizes.published:
        size += f", {format_bytes(sizes.published.total)} in files, {format_bytes(sizes.published.block)} per block"
    room = f"{format_bytes(sizes.room.memory)} {f'free on {sizes.device}' if sizes.device else 'as given by --memory'}"
    return [
        _line("size", size),
        _line("KV cache", f"{' and '.join(sizes.kv_rows)} per token and block; {sizes.room.kv_tokens} tokens planned"),
        _line("memory", f"{room}{', weights offloaded' if sizes.room.store is not None else ''}"),
        "",
        *_table(sizes),
        "",
        textwrap.fill(f"* what a node with these settings computes in.  {_spans(plan)}", SCREEN),
    ]


def _table(sizes: Sizes) -> list[str]:
    head = ("weights", "per block", "embedding", "LM head", "KV per token, block", "blocks per node", "nodes")
    rows = [head, *(_row(plan, sizes) for plan in sizes.plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    ]


def _row(plan: NodePlan, sizes: Sizes) -> tuple[str, ...]:
    footprint = plan.footprint
    mark = "* " if plan.format == sizes.chosen else "  "
    return (
        f"{mark}{plan.format}",
        format_bytes(footprint.block),
        format_bytes(footprint.ends.head),
        format_bytes(footprint.ends.tail),
        format_bytes(footprint.kv_row),
        _blocks_per_node(plan),
        str(len(plan.spans)) if plan.spans else _short(plan.refusal or ""),
    )


def _blocks_per_node(plan: NodePlan) -> str:
    limits = plan.limits
    if not plan.fit:
        return "none"
    if limits.whole or limits.is_same:
        return str(plan.fit)
    return f"{limits.middle}, first {limits.head}, last {limits.tail}"


def _short(refusal: str) -> str:
    return refusal.partition(": ")[0]


def _spans(plan: NodePlan) -> str:
    if not plan.fit:
        return f"It hosts nothing here: {plan.refusal}"
    if not plan.spans:
        return f"Such nodes alone do not hold the whole model: {plan.refusal}"
    if len(plan.spans) == 1:
        return f"One node holds the whole model; it needs at most {format_bytes(plan.peak)}."
    named = ", ".join(str(span) for span in plan.spans[:LISTED_SPANS])
    more = f", … {plan.spans[-1]}" if len(plan.spans) > LISTED_SPANS else ""
    text = f"{len(plan.spans)} nodes like this hold the whole model: {named}{more}.  "
    text += f"Each needs at most {format_bytes(plan.peak)}."
    if plan.nodes_choosing > len(plan.spans):
        text += f"  Nodes that choose for themselves need up to {plan.nodes_choosing}; --blocks gives each its own."
    return text


def _count(parameters: int) -> str:
    for size, unit in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)


def _line(name: str, text: str) -> str:
    label = f"  {name + ':':<{INDENT}}"
    return textwrap.fill(
        text, SCREEN, initial_indent=label, subsequent_indent=" " * len(label), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
