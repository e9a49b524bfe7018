"""The result of a simulation, as numbers and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from treeswarm_bench.simulate import config
from treeswarm_bench.simulate.agenda import Agenda
from treeswarm_bench.simulate.clients import SimulatedClients
from treeswarm_bench.simulate.config import SimulationSettings
from treeswarm_bench.simulate.meter import MeterSample, SimulationMeter
from treeswarm_bench.simulate.nodes import SimulatedNodes
from treeswarm_bench.simulate.registry import SimulatedRegistry


@dataclass(frozen=True)
class SwarmFigures:
    """What happened to the blocks.  Numbers are shares of 1, unless the name says otherwise.

    `balance` is the weakest block's throughput divided by the best possible one.
    """

    coverage: float
    balance_mean: float
    balance_least: float
    balance_end: float
    lost_to_imbalance: float
    moves_per_hour: float
    moves_refused: int
    blocks_lost: int
    unhealed_blocks: int
    heal_p50_s: float | None
    heal_p95_s: float | None
    heal_beyond_load_p50_s: float | None
    heal_beyond_load_p95_s: float | None
    online_at_end: int


@dataclass(frozen=True)
class RequestFigures:
    """What clients met.  Numbers are counts, unless the name says otherwise.

    Every request is counted once more as `served`, `gave_up`, `no_route` or `waiting`; every served request is a
    session, counted once more as `finished`, `lost` or `unfinished` (it runs at the end); and every loss of a session's
    node as `recovered`, `not_recovered` (the session ended as lost) or `under_repair` (at the end).
    """

    requests: int
    served: int
    gave_up: int
    no_route: int
    waiting: int
    failed_first_share: float
    finished: int
    lost: int
    unfinished: int
    sessions_hit_by_a_loss: int
    recovered: int
    not_recovered: int
    under_repair: int
    traversal_p50_s: float | None
    traversal_p95_s: float | None
    coordinate_error_median: float


@dataclass(frozen=True)
class RegistryTraffic:
    """What nodes announced, per virtual second."""

    records_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class SimulationCost:
    """CPU time of this process, which differs from run to run, and the number of simulated events."""

    route_planning_p50_s: float | None
    events: int
    cpu_s: float


@dataclass(frozen=True)
class SimulationReport:
    """Everything that a simulation reports.  Apart from `cost` it is a function of `settings`."""

    settings: SimulationSettings
    swarm: SwarmFigures
    requests: RequestFigures
    registry: RegistryTraffic
    cost: SimulationCost
    samples: tuple[MeterSample, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the report without the samples, which are for the plot."""
        report = asdict(self)
        del report["samples"]
        del report["settings"]["forget_bans"]
        return report

    def as_table(self) -> Table:
        """Return a table for the terminal, a section per part of the report."""
        table = Table("what", "value", title=f"{self.settings.nodes:,} nodes, {self.settings.hours:g} h")
        for part in ("swarm", "requests", "registry", "cost"):
            for name, value in asdict(getattr(self, part)).items():
                table.add_row(name.replace("_", " "), _format(value))
            table.add_section()
        return table


def make_report(
    settings: SimulationSettings,
    meter: SimulationMeter,
    nodes: SimulatedNodes,
    clients: SimulatedClients,
    registry: SimulatedRegistry,
    coordinate_error: float,
    agenda: Agenda,
    cpu_s: float,
) -> SimulationReport:
    """Gather the report of a simulation that has ended."""
    counts, seconds = clients.counts, settings.seconds
    return SimulationReport(
        settings,
        SwarmFigures(
            coverage=meter.covered_s / seconds,
            balance_mean=meter.balance_s / seconds,
            balance_least=meter.least_balance,
            balance_end=meter.weakest / meter.best if meter.online else 0.0,
            lost_to_imbalance=1 - meter.balance_s / seconds,
            moves_per_hour=nodes.moves / settings.hours,
            moves_refused=nodes.moves_refused,
            blocks_lost=len(meter.heal_s) + len(meter.missing_since),
            unhealed_blocks=len(meter.missing_since),
            heal_p50_s=_percentile(meter.heal_s, 50),
            heal_p95_s=_percentile(meter.heal_s, 95),
            heal_beyond_load_p50_s=_percentile(meter.heal_beyond_load_s, 50),
            heal_beyond_load_p95_s=_percentile(meter.heal_beyond_load_s, 95),
            online_at_end=meter.online,
        ),
        RequestFigures(
            requests=counts["requests"],
            served=counts["served"],
            gave_up=counts["gave_up"],
            no_route=counts["no_route"],
            waiting=counts["waiting"],
            failed_first_share=counts["failed_first"] / max(counts["requests"], 1),
            finished=counts["finished"],
            lost=counts["lost"],
            unfinished=len(clients.running),
            sessions_hit_by_a_loss=counts["deaths"],
            recovered=counts["recovered"],
            not_recovered=counts["not_recovered"],
            under_repair=sum(len(session.broken) for session in clients.running),
            traversal_p50_s=_percentile(clients.traversal_s, 50),
            traversal_p95_s=_percentile(clients.traversal_s, 95),
            coordinate_error_median=coordinate_error,
        ),
        RegistryTraffic(registry.announced / seconds, registry.announced * config.RECORD_BYTES / seconds),
        SimulationCost(_percentile(clients.planning_s, 50), agenda.events, cpu_s),
        tuple(meter.samples),
    )


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def _format(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
