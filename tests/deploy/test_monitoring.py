"""Dashboard, alerts and scrapes: every query is PromQL for series that node and gateway really export."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase
from tests.support.deploy_files import (
    DEPLOY,
    SECRETS,
    accepted_by_gateway,
    accepted_by_node,
    composed,
    module,
    yaml_documents,
)

from treeswarm.protocol.address import Address
from treeswarm_client.gateway.admission import Admission
from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.monitoring.metrics import GatewayMetrics
from treeswarm_node.monitoring.prometheus import METRICS

MONITORING = DEPLOY / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/swarm.json").read_text("utf-8"))
# Prometheus adds these to everything that it scrapes.
SCRAPED = {"job", "instance"}
REQUIRED_PANELS = (
    "Tokens per second", "Tokens per traversal", "Acceptance", "Tree size", "Time to first token", "Between two tokens",
    "Hop: computing", "Hop: waiting for the device", "Free KV cache", "Sessions", "Repairs per minute",
    "Nodes banned", "Blocks missing",
)  # fmt: skip


def exported_series() -> dict[str, set[str]]:
    """Return every series that Prometheus can have, with its labels, from the programs' own collectors."""
    names: dict[str, set[str]] = {"up": set()}
    for metric in METRICS:
        names[metric.shown] = set(metric.labels)
    gateway = GatewayMetrics()
    gateway.add_gauges(lambda: Admission(GatewayLimits()), lambda: None)
    collectors = [*vars(gateway).values(), *vars(gateway.rounds).values()]
    declared = {member._name: member for member in collectors if isinstance(member, MetricWrapperBase)}
    process = CollectorRegistry()
    ProcessCollector(registry=process)
    for family in (*gateway.registry.collect(), *process.collect()):
        labels = set(declared[family.name]._labelnames) if family.name in declared else set()
        match family.type:
            case "counter":
                names[f"{family.name}_total"] = labels
            case "histogram":
                names |= {f"{family.name}_{part}": labels for part in ("sum", "count")}
                names[f"{family.name}_bucket"] = labels | {"le"}
            case _:
                names[family.name] = labels
    return names


SERIES = exported_series()


def expressions() -> Iterator[tuple[str, str]]:
    """Yield each query, after the place that asks it."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']}", target["expr"]
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"]


def rules() -> list[dict[str, Any]]:
    (document,) = yaml_documents(MONITORING / "alerts.yaml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def walk(expression: Any) -> Iterator[Any]:
    """Yield an expression and all its parts."""
    yield expression
    for part in ("expr", "lhs", "rhs", "vector_selector", "vs"):
        inner = getattr(expression, part, None)
        if inner is not None and not isinstance(inner, str):
            yield from walk(inner)
    for argument in getattr(expression, "args", None) or ():
        yield from walk(argument)


def series_of(text: str) -> set[str]:
    """Return the series that an expression asks for; fail if a series or label is not exported."""
    promql = module("promql_parser")
    # Grafana puts a duration there.
    parts = list(walk(promql.parse(text.replace("$__rate_interval", "1m"))))
    selected = [part for part in parts if isinstance(part, promql.VectorSelector)]
    labels = set(SCRAPED)
    for selector in selected:
        assert selector.name in SERIES, f"nothing exports {selector.name}"
        labels |= SERIES[selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in SERIES[selector.name] | SCRAPED, f"{selector.name} has no label {matcher.name}"
    for part in parts:
        if isinstance(part, promql.AggregateExpr) and part.modifier is not None:
            assert set(part.modifier.labels) <= labels, f"no series has the labels {part.modifier.labels}"
    return {selector.name for selector in selected}


@pytest.mark.parametrize(("where", "text"), list(expressions()))
def test_every_query_asks_for_exported_series(where: str, text: str) -> None:
    assert series_of(text)


@pytest.mark.parametrize(
    "text",
    ["sum(rate(treeswarm_gateway_tokens[1m]))", "treeswarm_node_kv_rooms", 'treeswarm_gateway_tokens_total{sort="x"}',
     "sum by (region) (treeswarm_node_sessions)", "treeswarm_node_sessions / up{colour='red'}"],
)  # fmt: skip
def test_wrong_query_is_noticed(text: str) -> None:
    with pytest.raises(AssertionError, match=r"nothing exports|no label|no series has"):
        series_of(text)


def test_all_queries_are_checked() -> None:
    assert len(list(expressions())) > 45
    series = {name for _, text in expressions() for name in series_of(text)}
    assert len(series) > 30
    assert series_of("treeswarm_node_peers + sum(up)") == {"treeswarm_node_peers", "up"}


def test_dashboard_is_what_its_program_writes() -> None:
    program = runpy.run_path(str(MONITORING / "grafana/make.py"))
    assert program["dashboard"]() == DASHBOARD, "run deploy/monitoring/grafana/make.py"


def test_dashboard_has_the_required_panels_without_overlap() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert set(REQUIRED_PANELS) <= {panel["title"] for panel in panels}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for grid in [panel["gridPos"]]
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert max(x for x, _ in cells) < 24
    assert len(set(cells)) == len(cells), "panels overlap"


def test_dashboard_finds_its_datasource() -> None:
    (provisioned,) = yaml_documents(MONITORING / "grafana/datasource.yaml")
    (source,) = provisioned["datasources"]
    uids = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if "datasource" in panel}
    assert uids == {source["uid"]}
    host, port = source["url"].removeprefix("http://").split(":")
    assert [mapping["target"] for mapping in composed().services[host]["ports"]] == [int(port)]
    (dashboards,) = yaml_documents(MONITORING / "grafana/dashboards.yaml")
    mounted = {Path(volume["target"]).parent for volume in composed().services["grafana"]["volumes"]}
    assert Path(dashboards["providers"][0]["options"]["path"]) in mounted


def test_prometheus_scrapes_the_services_of_compose() -> None:
    (config,) = yaml_documents(MONITORING / "prometheus.yaml")
    swarm = composed()
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    targets = jobs["treeswarm-node"]["static_configs"][0]["targets"]
    assert sorted(target.partition(":")[0] for target in targets) == sorted(swarm.nodes)
    for target in targets:
        name, _, port = target.partition(":")
        assert Address.parse(str(accepted_by_node(swarm.environment(name)).operations.metrics)).port == int(port)
    (gateway,) = jobs["treeswarm-gateway"]["static_configs"][0]["targets"]
    environment = swarm.environment("gateway")
    assert Address.parse(accepted_by_gateway(environment).listen).port == Address.parse(gateway).port
    assert jobs["treeswarm-gateway"]["authorization"]["credentials_file"] == "/run/secrets/api_key"
    assert [secret["source"] for secret in swarm.services["prometheus"]["secrets"]] == ["api_key"]
    assert environment["TREESWARM_API_KEYS"] == SECRETS["TREESWARM_API_KEY"]
    assert config["rule_files"] == ["alerts.yaml"]


def test_down_alerts_are_for_treeswarm_jobs_only() -> None:
    (config,) = yaml_documents(MONITORING / "prometheus.yaml")
    monitors = yaml_documents(DEPLOY / "kubernetes/extras/monitors.yaml")
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    relabelled = [
        rule for monitor in monitors for endpoint in monitor["spec"]["endpoints"] for rule in endpoint["relabelings"]
    ]
    assert {rule["replacement"] for rule in relabelled if rule["targetLabel"] == "job"} == jobs
    assert {rule["expr"] for rule in rules() if "up{" in rule["expr"]} == {f'up{{job="{job}"}} == 0' for job in jobs}


def test_every_alert_says_what_to_do() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules()) >= 8
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "action"}
