"""Runs one simulation from beginning to end."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from treeswarm.topology.coordinates import as_points, distances
from treeswarm_bench.simulate import config
from treeswarm_bench.simulate.agenda import Agenda
from treeswarm_bench.simulate.clients import SimulatedClients
from treeswarm_bench.simulate.config import SimulationSettings
from treeswarm_bench.simulate.hosts import draw_hosts
from treeswarm_bench.simulate.meter import MeterSample, SimulationMeter
from treeswarm_bench.simulate.nodes import SimulatedNodes
from treeswarm_bench.simulate.registry import ABSENT, SimulatedRegistry
from treeswarm_bench.simulate.report import SimulationReport, make_report


def simulate(settings: SimulationSettings, progress: Callable[[float], None] = lambda _: None) -> SimulationReport:
    """Simulate a swarm for `settings.hours`.

    The same settings give the same report, apart from `cost`.  `progress` is called now and then with the number of
    hours done.
    """
    began = time.process_time()
    random = np.random.default_rng(settings.seed)
    replaced = int(random.poisson(settings.nodes * settings.churn * settings.hours))
    hosts = draw_hosts(settings.nodes + replaced + settings.flash_crowd, settings.blocks, random)
    agenda, meter = Agenda(), SimulationMeter(settings.blocks)
    registry = SimulatedRegistry(hosts, agenda, random)
    nodes = SimulatedNodes(settings, hosts, agenda, registry, meter, random)
    nodes.grow(settings.nodes)
    clients = SimulatedClients(settings, agenda, nodes, random)
    clients.begin()
    _plan_arrivals(settings, replaced, agenda, nodes, random)
    for number in range(settings.holes):
        agenda.after(settings.seconds * (number + 0.5) / settings.holes, nodes.lose_a_block)
    _repeat(agenda, config.POLL_S, registry.poll)
    _repeat(agenda, config.POLL_S, nodes.poll)

    def sample() -> None:
        _sample(agenda, meter, nodes, clients)
        progress(agenda.now / 3600)

    _repeat(agenda, config.SAMPLE_S, sample)
    agenda.run(settings.seconds)
    meter.advance(settings.seconds)
    error = _coordinate_error(nodes, random)
    return make_report(settings, meter, nodes, clients, registry, error, agenda, time.process_time() - began)


def _plan_arrivals(
    settings: SimulationSettings, replaced: int, agenda: Agenda, nodes: SimulatedNodes, random: np.random.Generator
) -> None:
    """Plan when nodes arrive, in the order of their index.  A replacement arrives as another node leaves."""
    replacements = random.uniform(0, settings.seconds, replaced)
    crowd = settings.seconds / 4 + random.uniform(0, 60, settings.flash_crowd)
    arrivals = sorted([(at, True) for at in replacements.tolist()] + [(at, False) for at in crowd.tolist()])
    for number, (at, replaces) in enumerate(arrivals):
        agenda.after(at, partial(_arrive, nodes, settings.nodes + number, replaces))


def _arrive(nodes: SimulatedNodes, node: int, replaces: bool) -> None:
    if replaces:
        nodes.leave_one()
    nodes.arrive(node)


def _repeat(agenda: Agenda, seconds: float, action: Callable[[], None]) -> None:
    def run_and_plan_next() -> None:
        action()
        agenda.after(seconds, run_and_plan_next)

    agenda.after(seconds, run_and_plan_next)


def _sample(agenda: Agenda, meter: SimulationMeter, nodes: SimulatedNodes, clients: SimulatedClients) -> None:
    counts = clients.counts
    requests, failed = counts["requests"] - counts["sampled"], counts["failed_first"] - counts["sampled_failed"]
    counts["sampled"], counts["sampled_failed"] = counts["requests"], counts["failed_first"]
    share = failed / requests if requests else 0.0
    meter.samples.append(MeterSample(agenda.now / 3600, meter.weakest, meter.best, meter.online, nodes.moves, share))


def _coordinate_error(nodes: SimulatedNodes, random: np.random.Generator) -> float:
    """Return the median relative error of predicted round trips between living nodes."""
    alive = np.flatnonzero(nodes.truth.state != ABSENT)
    if len(alive) < 2:
        return 0.0
    chosen = random.choice(alive, size=min(len(alive), 200), replace=False)
    pairs = ~np.eye(len(chosen), dtype=bool)
    true = distances(nodes.hosts.place[chosen], nodes.hosts.place[chosen])[pairs]
    points = as_points(nodes.coordinates[node] for node in chosen.tolist())
    return float(np.median(np.abs(distances(points, points)[pairs] - true) / true))
