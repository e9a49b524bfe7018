"""What the pages promise is what the programs say."""

import re
from pathlib import Path

from treeswarm_client.gateway.admission import Admission
from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.metrics import PREFIX, GatewayMetrics

DOCS = Path(__file__).parents[3] / "docs"


def test_every_metric_of_the_gateway_is_in_the_table_and_no_other() -> None:
    metrics = GatewayMetrics()
    metrics.follow(lambda: Admission(GatewayLimits()), lambda: None)
    told = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in metrics.registry.collect()
    }
    table = re.findall(rf"^\| `({PREFIX}_\w+)` \| (\w+) \|", (DOCS / "metrics.md").read_text("utf-8"), re.MULTILINE)
    assert dict(table) == told


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "ARCHITECTURE.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if not (page.parent / target).exists():
                broken.append((page.name, target))
    assert not broken
