"""`swarm bench draw`: the figures of `swarm bench wan` as pictures.  It needs the extra `plot`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treeswarm.errors import BadRequest
from treeswarm_bench.simulate.plot import require_matplotlib

WIDTH, PANEL_HEIGHT, DPI = 12.0, 2.6, 110
FORMATS: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".png": {"Software": None}}
"""Formats by suffix, each with the metadata to leave out because it differs between runs or versions."""


async def bench_draw(source: Path | None, out: Path | None) -> dict[str, Any]:
    """Draw the figures in `source`, and return the paths of the pictures.  Raises BadRequest without both paths."""
    if source is None or out is None:
        raise BadRequest("draw needs a file to read and one to write: swarm bench draw FILE.json --out FILE.svg")
    return {"bench": "draw", "wrote": [str(path) for path in draw(source, out)]}


def draw(source: Path, out: Path) -> list[Path]:
    """Write one picture per temperature, and return the paths.

    A picture has one row of panels per text and one panel per cell.  A panel has one bar per strategy, relative to
    plain decoding, with its interval.  With several temperatures, each picture's name ends in its own.
    Raises BadRequest if `source` holds no figures, or `out` has another suffix than .svg or .png.
    """
    require_matplotlib()
    if out.suffix.lower() not in FORMATS:
        raise BadRequest(f"unsupported picture format '{out}': name a file that ends in {' or '.join(FORMATS)}")
    result = _read(source)
    temperatures = list(dict.fromkeys(row["temperature"] for row in result["rows"]))
    written = []
    for temperature in temperatures:
        path = out.with_stem(f"{out.stem}-t{temperature:g}") if len(temperatures) > 1 else out
        _draw_picture([row for row in result["rows"] if row["temperature"] == temperature], result["cells"], path)
        written.append(path)
    return written


def _draw_picture(rows: Sequence[Mapping[str, Any]], cells: Mapping[str, Any], out: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415  # an optional extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    names = [cell for cell in cells if any(row["cell"] == cell for row in rows)]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    figure = Figure(figsize=(WIDTH, PANEL_HEIGHT * len(texts) + 1.2), layout="constrained")
    panels = figure.subplots(len(texts), len(names), squeeze=False, sharey="row")
    by_panel = {(row["text"], row["cell"]): row["strategies"] for row in rows}
    order = list(dict.fromkeys(name for row in rows for name in row["strategies"] if name != "plain"))
    for i, text in enumerate(texts):
        for j, cell in enumerate(names):
            _draw_panel(panels[i][j], by_panel.get((text, cell), {}), order)
            if i == 0:
                panels[i][j].set_title(f"{cell}\n{cells[cell]['link']}", fontsize=8)
            if i + 1 < len(texts):
                panels[i][j].set_xticklabels([])
        panels[i][0].set_ylabel(f"{text}\ntokens/s relative to plain", fontsize=8)
    figure.suptitle(f"T = {rows[0]['temperature']:g}; lines hold nine of ten draws of a paired bootstrap", fontsize=9)
    try:
        # The same figures give the same file: it has no date, and its parts have no random names.
        with mpl.rc_context({"svg.hashsalt": "treeswarm"}):
            figure.savefig(out, dpi=DPI, metadata=FORMATS[out.suffix.lower()])
    except OSError as error:
        raise BadRequest(f"cannot write the picture to {out}: {error}") from error


def _draw_panel(panel: Any, strategies: Mapping[str, Any], order: Sequence[str]) -> None:
    panel.axhline(1.0, color="0.4", linewidth=0.8)
    for place, name in enumerate(order):
        if name not in strategies:
            continue
        ratio = strategies[name]["over_plain"]
        value, low, high = ratio["value"], ratio["low"], ratio["high"]
        panel.bar(place, value, color="C0" if name == "auto" else "C7", width=0.75)
        if low is not None:
            # The interval of a bootstrap need not hold the estimate itself.
            panel.errorbar(place, value, [[max(0.0, value - low)], [max(0.0, high - value)]], color="0.1", capsize=2)
    panel.set_xticks(range(len(order)), order, rotation=60, ha="right", fontsize=7)
    panel.tick_params(axis="y", labelsize=7)
    panel.set_xlim(-0.6, len(order) - 0.4)


def _read(source: Path) -> dict[str, Any]:
    try:
        result = json.loads(source.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"cannot read {source}: {error}") from error
    if not isinstance(result, dict) or not result.get("rows") or "cells" not in result:
        raise BadRequest(f"{source} holds no figures: name a file with the output of swarm bench wan --json")
    return result
