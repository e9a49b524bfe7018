"""Write the dashboard swarm.json: `python deploy/monitoring/grafana/make.py`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "treeswarm-prometheus"}
RATE = "[$__rate_interval]"
GATEWAY, NODE = "treeswarm_gateway", "treeswarm_node"
COLUMNS = 24


@dataclass(frozen=True)
class Panel:
    """One picture of the dashboard, with its queries."""

    title: str
    queries: Sequence[tuple[str, str]]
    """Prometheus expressions, each with the legend of its lines."""
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    """Columns of the `COLUMNS` that the dashboard has."""
    height: int = 8
    help: str = ""
    red_above: float | None = None
    """Value from which on a number is red, or None."""
    red_below: float | None = None
    """Value below which a number is red, or None."""


def rate(metric: str, by: str = "") -> str:
    """Return the rate of a counter, summed over all instances or for each value of the labels `by`."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{RATE}))"


def mean(histogram: str) -> str:
    """Return the mean of all observations in the interval."""
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


def quantiles(histogram: str, where: str = "", label: str = "") -> list[tuple[str, str]]:
    """Return the median and the 95th percentile, each with its legend."""
    name = f"{label} " if label else ""
    return [
        (f"histogram_quantile({share}, {rate(f'{histogram}_bucket{where}', 'le')})", f"{name}p{round(100 * share)}")
        for share in (0.5, 0.95)
    ]


ROWS: dict[str, list[Panel]] = {
    "The swarm": [
        Panel("Ready", [(f"min({GATEWAY}_ready)", "")], kind="stat", width=4, height=4, red_below=1,
              help="1 if every block is served"),
        Panel("Blocks missing", [(f"max({GATEWAY}_missing_blocks)", "")], kind="stat", width=4, height=4, red_above=1,
              help="Blocks that no node serves"),
        Panel("Nodes online", [(f"max({GATEWAY}_nodes)", "")], kind="stat", width=4, height=4),
        Panel("Nodes banned", [(f"max({GATEWAY}_bans)", "")], kind="stat", width=4, height=4, red_above=1,
              help="Nodes avoided for a while because they failed"),
        Panel("Generating", [(f"sum({GATEWAY}_generations)", "")], kind="stat", width=4, height=4),
        Panel("Waiting", [(f"sum({GATEWAY}_waiting)", "")], kind="stat", width=4, height=4, red_above=100),
    ],
    "What callers see": [
        Panel("Tokens per second", [(rate(f"{GATEWAY}_tokens_total", "kind"), "{{kind}}")], unit="tok/s",
              help="completion: new tokens; prompt: tokens of prompts; cached: those of them found in prefix caches"),
        Panel("Time to first token", quantiles(f"{GATEWAY}_first_token_seconds"), unit="s",
              help="From the arrival of a request, including the time that it waits"),
        Panel("Between two tokens", quantiles(f"{GATEWAY}_inter_token_seconds"), unit="s",
              help="Tokens of one traversal arrive together: the median is far below a round trip"),
        Panel("Requests by status", [(rate(f"{GATEWAY}_requests_total", "endpoint, status"),
              "{{endpoint}} {{status}}")], unit="reqps", width=12),
        Panel("Generations", [(f"sum({GATEWAY}_generations)", "running"), (f"sum({GATEWAY}_waiting)", "waiting")],
              width=12),
    ],
    "Speculation": [
        Panel("Tokens per traversal", [(mean(f"{GATEWAY}_tokens_per_traversal"), "mean"),
              *quantiles(f"{GATEWAY}_tokens_per_traversal")],
              help="Tokens committed per traversal; 1 is plain decoding"),
        Panel("Acceptance", [
            (f"{rate(f'{GATEWAY}_tree_hits_total')} / ({rate(f'{GATEWAY}_tree_hits_total')} + "
             f"{rate(f'{GATEWAY}_tree_misses_total')})", "per step of the walk"),
            (f"{rate(f'{GATEWAY}_tree_hits_total')} / {rate(f'{GATEWAY}_tree_nodes_total')}", "per drafted node"),
        ], unit="percentunit", help="Share of a walk's steps that found the target's token in the tree; share of all "
              "drafted nodes that were the target's token"),
        Panel("Tree size", [(mean(f"{GATEWAY}_tree_size"), "mean"), *quantiles(f"{GATEWAY}_tree_size")],
              help="Number of drafted nodes in one round"),
    ],
    "Time of a round": [
        Panel("Round", quantiles(f"{GATEWAY}_round_seconds"), unit="s",
              help="From the first append to the end of the walk"),
        Panel("Hop: computing", quantiles(f"{GATEWAY}_hop_seconds", '{part="compute"}'), unit="s"),
        Panel("Hop: waiting for the device", quantiles(f"{GATEWAY}_hop_seconds", '{part="queue"}'), unit="s"),
        Panel("Traversals per second", [(rate(f"{GATEWAY}_traversals_total"), "traversals")], unit="ops", width=12),
        Panel("Repairs per minute", [(f"60 * {rate(f'{GATEWAY}_failovers_total')}", "chains repaired"),
              (f"max({GATEWAY}_bans)", "nodes banned")], width=12),
    ],
    "Nodes": [
        Panel("Free KV cache", [(f"{NODE}_kv_tokens_free", "{{instance}} free"),
              (f"sum({GATEWAY}_kv_free_tokens)", "all, as announced")]),
        Panel("Sessions", [(f"{NODE}_sessions", "{{instance}}")]),
        Panel("Sessions refused", [(rate(f"{NODE}_sessions_refused_total", "instance, reason"),
              "{{instance}} {{reason}}")], unit="ops"),
        Panel("Device busy", [(rate(f"{NODE}_compute_seconds_total", "instance"), "{{instance}}")], unit="percentunit"),
        Panel("Waiting for the device", [(f"{rate(f'{NODE}_queue_seconds_total', 'instance')} / "
              f"{rate(f'{NODE}_frames_total', 'instance')}", "{{instance}}")], unit="s"),
        Panel("Sessions per forward", [(f"{rate(f'{NODE}_forward_sessions_total', 'instance')} / "
              f"{rate(f'{NODE}_forwards_total', 'instance')}", "{{instance}}")]),
        Panel("Rows computed", [(rate(f"{NODE}_rows_total", "instance"), "{{instance}}")], unit="rowsps",
              help="Rows of prompts and tree nodes, including those that did not become part of the text"),
        Panel("Sent", [(f"8 * {rate(f'{NODE}_sent_bytes_total', 'instance, kind')}", "{{instance}} {{kind}}")],
              unit="bps"),
        Panel("Memory", [(f"{NODE}_memory_bytes", "{{instance}}")], unit="bytes"),
        Panel("Blocks hosted", [(f"{NODE}_span_start", "{{instance}} from"), (f"{NODE}_span_end", "{{instance}} to")],
              width=12),
        Panel("State", [(f"{NODE}_state == 1", "{{instance}} {{state}}")], width=12),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False,
                       "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}, "panels": []})  # fmt: skip
        y, x = y + 1, 0
        for panel in row:
            if x + panel.width > COLUMNS:
                y, x = y + panel.height, 0
            panels.append(_panel_json(panel, len(panels) + 1, x, y))
            x += panel.width
        y += row[-1].height
    return {
        "uid": "treeswarm",
        "title": "treeswarm",
        "tags": ["treeswarm"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": []},
        "annotations": {"list": []},
        "panels": panels,
    }


def _panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, **_colours(panel)}, "overrides": []},
        "options": _options(panel),
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend or "__auto"}
            for i, (expr, legend) in enumerate(panel.queries)
        ],
    }


def _colours(panel: Panel) -> dict[str, Any]:
    if panel.red_above is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.red_above}]
    elif panel.red_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.red_below}]
    else:
        steps = [{"color": "green", "value": None}]
    return {"thresholds": {"mode": "absolute", "steps": steps}}


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}


if __name__ == "__main__":
    text = json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"
    Path(__file__).with_name("swarm.json").write_text(text, "utf-8")
