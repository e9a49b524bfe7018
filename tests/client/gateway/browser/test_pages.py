"""The documentation lists the gateway's metrics, and its links lead to existing files."""

import re
from pathlib import Path

from treeswarm_client.gateway.admission import Admission
from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.monitoring.metrics import PREFIX, GatewayMetrics

DOCS = Path(__file__).parents[4] / "docs"


def test_documented_metrics_are_those_of_the_gateway() -> None:
    metrics = GatewayMetrics()
    metrics.add_gauges(lambda: Admission(GatewayLimits()), lambda: None)
    exported = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in metrics.registry.collect()
    }
    table = re.findall(rf"^\| `({PREFIX}_\w+)` \| (\w+) \|", (DOCS / "metrics.md").read_text("utf-8"), re.MULTILINE)
    assert dict(table) == exported


def test_links_between_pages_lead_to_files() -> None:
    broken = []
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "ARCHITECTURE.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if not (page.parent / target).exists():
                broken.append((page.name, target))
    assert not broken
