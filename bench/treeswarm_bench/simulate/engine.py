"""One simulation from beginning to end."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from treeswarm.topology.coordinates import as_points, distances
from treeswarm_bench.simulate import config
from treeswarm_bench.simulate.agenda import Agenda
from treeswarm_bench.simulate.clients import Clients
from treeswarm_bench.simulate.config import Settings
from treeswarm_bench.simulate.hosts import draw_hosts
from treeswarm_bench.simulate.meter import MeterSample, SimulationMeter
from treeswarm_bench.simulate.nodes import Nodes
from treeswarm_bench.simulate.registry import ABSENT, SimulatedRegistry
from treeswarm_bench.simulate.report import Report, make_report


def simulate(settings: Settings, progress: Callable[[float], None] = lambda _: None) -> Report:
    """Let a swarm live for `settings.hours`; the same settings give the same report, but for `cost`.  `progress` hears
    now and then how many of those hours are done."""
    began = time.process_time()
    random = np.random.default_rng(settings.seed)
    replaced = int(random.poisson(settings.nodes * settings.churn * settings.hours))
    hosts = draw_hosts(settings.nodes + replaced + settings.flash_crowd, settings.blocks, random)
    agenda, meter = Agenda(), SimulationMeter(settings.blocks)
    registry = SimulatedRegistry(hosts, agenda, random)
    nodes = Nodes(settings, hosts, agenda, registry, meter, random)
    nodes.grow(settings.nodes)
    clients = Clients(settings, agenda, nodes, random)
    clients.begin()
    _plan_arrivals(settings, replaced, agenda, nodes, random)
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
    settings: Settings, replaced: int, agenda: Agenda, nodes: Nodes, random: np.random.Generator
) -> None:
    """Nodes arrive in the order of their index; a replacement comes as another node goes."""
    replacements = random.uniform(0, settings.seconds, replaced)
    crowd = settings.seconds / 4 + random.uniform(0, 60, settings.flash_crowd)
    arrivals = sorted([(at, True) for at in replacements.tolist()] + [(at, False) for at in crowd.tolist()])
    for number, (at, replaces) in enumerate(arrivals):
        agenda.after(at, partial(_arrive, nodes, settings.nodes + number, replaces))


def _arrive(nodes: Nodes, node: int, replaces: bool) -> None:
    if replaces:
        nodes.leave_one()
    nodes.arrive(node)


def _repeat(agenda: Agenda, seconds: float, action: Callable[[], None]) -> None:
    def again() -> None:
        action()
        agenda.after(seconds, again)

    agenda.after(seconds, again)


def _sample(agenda: Agenda, meter: SimulationMeter, nodes: Nodes, clients: Clients) -> None:
    counts = clients.counts
    requests, failed = counts["requests"] - counts["sampled"], counts["failed_first"] - counts["sampled_failed"]
    counts["sampled"], counts["sampled_failed"] = counts["requests"], counts["failed_first"]
    share = failed / requests if requests else 0.0
    meter.samples.append(MeterSample(agenda.now / 3600, meter.weakest, meter.best, meter.online, nodes.moves, share))


def _coordinate_error(nodes: Nodes, random: np.random.Generator) -> float:
    """Median relative error of predicted round trips between living nodes."""
    alive = np.flatnonzero(nodes.truth.state != ABSENT)
    if len(alive) < 2:
        return 0.0
    chosen = random.choice(alive, size=min(len(alive), 200), replace=False)
    pairs = ~np.eye(len(chosen), dtype=bool)
    true = distances(nodes.hosts.place[chosen], nodes.hosts.place[chosen])[pairs]
    points = as_points(nodes.coordinates[node] for node in chosen.tolist())
    return float(np.median(np.abs(distances(points, points)[pairs] - true) / true))
