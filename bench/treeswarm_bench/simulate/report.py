"""What came out, as numbers and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from treeswarm_bench.simulate import config
from treeswarm_bench.simulate.agenda import Agenda
from treeswarm_bench.simulate.clients import Clients
from treeswarm_bench.simulate.config import Settings
from treeswarm_bench.simulate.meter import MeterSample, SimulationMeter
from treeswarm_bench.simulate.nodes import Nodes
from treeswarm_bench.simulate.registry import SimulatedRegistry


@dataclass(frozen=True)
class Swarm:
    """Shares of 1, unless the name says otherwise.  `balance`: the weakest block's throughput over the best one."""

    coverage: float
    balance_mean: float
    balance_least: float
    balance_end: float
    lost_to_imbalance: float
    moves_an_hour: float
    moves_refused: int
    blocks_lost: int
    unhealed_blocks: int
    heal_p50_s: float | None
    heal_p95_s: float | None
    online_at_end: int


@dataclass(frozen=True)
class Requests:
    """Counts, unless the name says otherwise.  Every request is served, gave_up, no_route or still waiting."""

    requests: int
    served: int
    gave_up: int
    no_route: int
    waiting: int
    failed_first_share: float
    sessions_hit_by_a_loss: int
    recovered: int
    lost: int
    traversal_p50_s: float | None
    traversal_p95_s: float | None
    coordinate_error_median: float


@dataclass(frozen=True)
class ClientTraffic:
    records_a_second: float
    bytes_a_second: float


@dataclass(frozen=True)
class Cost:
    """CPU time of this process: it differs from run to run."""

    route_planning_p50_s: float | None
    events: int
    cpu_s: float


@dataclass(frozen=True)
class Report:
    """`cost` apart, a function of `settings`."""

    settings: Settings
    swarm: Swarm
    requests: Requests
    registry: ClientTraffic
    cost: Cost
    samples: tuple[MeterSample, ...]

    def as_json(self) -> dict[str, Any]:
        """Without the samples, which are for the plot."""
        made = asdict(self)
        del made["samples"]
        del made["settings"]["forget_bans"]
        return made

    def as_table(self) -> Table:
        table = Table("what", "value", title=f"{self.settings.nodes:,} nodes, {self.settings.hours:g} h")
        for part in ("swarm", "requests", "registry", "cost"):
            for name, value in asdict(getattr(self, part)).items():
                table.add_row(name.replace("_", " "), _shown(value))
            table.add_section()
        return table


def make_report(
    settings: Settings,
    meter: SimulationMeter,
    nodes: Nodes,
    clients: Clients,
    registry: SimulatedRegistry,
    coordinate_error: float,
    agenda: Agenda,
    cpu_s: float,
) -> Report:
    counts, seconds = clients.counts, settings.seconds
    return Report(
        settings,
        Swarm(
            coverage=meter.covered_s / seconds,
            balance_mean=meter.balance_s / seconds,
            balance_least=meter.least_balance,
            balance_end=meter.weakest / meter.best if meter.online else 0.0,
            lost_to_imbalance=1 - meter.balance_s / seconds,
            moves_an_hour=nodes.moves / settings.hours,
            moves_refused=nodes.moves_refused,
            blocks_lost=len(meter.heal_s) + len(meter.missing_since),
            unhealed_blocks=len(meter.missing_since),
            heal_p50_s=_percentile(meter.heal_s, 50),
            heal_p95_s=_percentile(meter.heal_s, 95),
            online_at_end=meter.online,
        ),
        Requests(
            requests=counts["requests"],
            served=counts["served"],
            gave_up=counts["gave_up"],
            no_route=counts["no_route"],
            waiting=counts["waiting"],
            failed_first_share=counts["failed_first"] / max(counts["requests"], 1),
            sessions_hit_by_a_loss=counts["deaths"],
            recovered=counts["recovered"],
            lost=counts["lost"],
            traversal_p50_s=_percentile(clients.traversal_s, 50),
            traversal_p95_s=_percentile(clients.traversal_s, 95),
            coordinate_error_median=coordinate_error,
        ),
        ClientTraffic(registry.announced / seconds, registry.announced * config.RECORD_BYTES / seconds),
        Cost(_percentile(clients.planning_s, 50), agenda.happened, cpu_s),
        tuple(meter.samples),
    )


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def _shown(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
