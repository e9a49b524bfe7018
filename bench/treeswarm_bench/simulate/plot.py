"""Draws the report as a picture; needs the extra `plot`."""

from pathlib import Path

from treeswarm.errors import BadRequest
from treeswarm.extras import require
from treeswarm_bench.simulate.report import SimulationReport


def require_matplotlib() -> None:
    """Raise BadRequest if matplotlib is missing.  Call it before a long simulation, not after."""
    require("plot", "a picture")


def write_plot(report: SimulationReport, path: Path) -> None:
    """Draw throughput and the best possible one, nodes and moves, and failed first attempts over virtual hours.

    Raises BadRequest if the file cannot be written or matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415

    samples, settings = report.samples, report.settings
    hours = [sample.hours for sample in samples]
    figure = Figure(figsize=(9, 8), layout="constrained")
    rate, life, failed = figure.subplots(3, sharex=True)
    rate.plot(hours, [sample.best for sample in samples], color="0.6", label="best possible")
    rate.plot(hours, [sample.weakest for sample in samples], color="C0", label="weakest block")
    rate.set(ylabel="rows/s", ylim=(0, 1.1 * max((sample.best for sample in samples), default=1)))
    rate.legend(loc="lower right")
    life.plot(hours, [sample.online for sample in samples], color="C0", label="nodes online")
    life.set(ylabel="nodes online", ylim=(0, 1.1 * max((sample.online for sample in samples), default=1)))
    moves, nodes_moved = life.twinx(), max((sample.moves for sample in samples), default=0)
    moves.plot(hours, [sample.moves for sample in samples], color="C1", label="moves so far (right)")
    moves.set(ylabel="moves", ylim=(0, 1.1 * max(nodes_moved, 10)))
    lines = [*life.lines, *moves.lines]
    moves.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
    failed.plot(hours, [100 * sample.failed for sample in samples], color="C3")
    failed.set(ylabel="first attempts that failed, %", xlabel="virtual hours", ylim=(0, 100))
    rate.set_title(
        f"{settings.nodes:,} nodes, {settings.blocks} blocks, {100 * settings.churn:g} % replaced per hour, "
        f"{settings.clients} clients, seed {settings.seed}"
    )
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise BadRequest(f"cannot write the plot to {path}: {error}") from error
