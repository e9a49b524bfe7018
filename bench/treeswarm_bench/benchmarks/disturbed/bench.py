"""`swarm bench disturbed`: every fault over every link on every kind of text, worst cases first."""

import asyncio
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.table import Table

from treeswarm.errors import BadRequest
from treeswarm_bench.benchmarks.disturbed.cases import FAULTS, LINKS, is_sensible
from treeswarm_bench.benchmarks.disturbed.judge import (
    LEAST_OF_BEST,
    LEAST_OF_PLAIN,
    MOST_EXPLORING,
    MOST_WRONG_NO,
    CaseVerdict,
    FixedSizes,
    judge,
)
from treeswarm_bench.benchmarks.disturbed.text import AGREEMENT
from treeswarm_client.provenance import machine_provenance

TEXTS = tuple(AGREEMENT)


async def bench_disturbed(
    *, faults: Sequence[str] | None, links: Sequence[str] | None, texts: Sequence[str] | None, seeds: Sequence[int]
) -> dict[str, Any]:
    """Judge the cases, and return all verdicts, the worst first.  `None` chooses all faults, links or texts."""
    torch.set_num_threads(1)
    started, verdicts = time.perf_counter(), []
    faults, texts = _known("case", faults, FAULTS), _known("text", texts, TEXTS)
    for link in _known("cell", links, LINKS):
        fixed = FixedSizes()
        for fault in (fault for fault in faults if is_sensible(fault, link)):
            for text in texts:
                # In a thread: the virtual clock has a loop of its own.
                verdicts.append(await _in_thread(fault, link, text, seeds, fixed))
                _report(verdicts[-1])
    return result_of(verdicts, seeds=seeds, minutes=(time.perf_counter() - started) / 60)


def result_of(verdicts: Sequence[CaseVerdict], *, seeds: Sequence[int], minutes: float) -> dict[str, Any]:
    """Return the verdicts as plain data, the worst first, with the bounds and how often each is broken."""
    bounds = {"plain": LEAST_OF_PLAIN, "best": LEAST_OF_BEST, "no": MOST_WRONG_NO, "exploring": MOST_EXPLORING}
    return {
        "bench": "disturbed",
        "well": not any(verdict.broken for verdict in verdicts),
        "seeds": list(seeds),
        "bounds": bounds,
        "broken": {name: sum(name in verdict.broken for verdict in verdicts) for name in bounds},
        "real_minutes": round(minutes, 1),
        "provenance": machine_provenance(),
        "cases": [verdict.as_dict() for verdict in sorted(verdicts, key=lambda verdict: verdict.badness)],
    }


def table_of(result: dict[str, Any]) -> Table:
    """Return the verdicts as a table, worst cases first."""
    broken, count = result["broken"], len(result["cases"])
    table = Table(
        title=f"{count} cases: {broken['plain']} under {LEAST_OF_PLAIN} of plain, {broken['best']} under "
        f"{LEAST_OF_BEST} of the best fixed size, {broken['no']} with more than {MOST_WRONG_NO} wrong plain rounds, "
        f"{broken['exploring']} exploring for more than {MOST_EXPLORING:.0%}"
    )
    for name in ("fault", "link", "text", "over plain: 32, 64, 128, 256", "of best fixed", "wrong no", "exploring"):
        table.add_column(name, justify="left" if name in ("fault", "link", "text") else "right")
    table.add_column("broken")
    for case in result["cases"]:
        table.add_row(
            case["fault"],
            case["link"],
            case["text"],
            "  ".join(f"{ratio:.2f}" for ratio in case["over_plain"].values()),
            f"{case['of_best']:.2f}",
            str(case["longest_wrong_no"]),
            f"{case['exploring']:.1%}",
            " ".join(case["broken"]),
        )
    return table


async def _in_thread(fault: str, link: str, text: str, seeds: Sequence[int], fixed: FixedSizes) -> CaseVerdict:
    return await asyncio.to_thread(judge, fault, link, text, seeds=seeds, fixed=fixed)


def _report(verdict: CaseVerdict) -> None:
    ratios = " ".join(f"{ratio:.2f}" for ratio in verdict.over_plain.values())
    print(
        f"{verdict.link} {verdict.fault}, {verdict.text}: over plain {ratios}, of best {verdict.least_of_best:.2f}"
        f"  {' '.join(verdict.broken)}",
        file=sys.stderr,
        flush=True,
    )


def _known(kind: str, names: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Return the names, or all known ones for None.  Raises BadRequest for an unknown name."""
    choices = list(known)
    for name in names or ():
        if name not in choices:
            raise BadRequest(f"unknown {kind} '{name}': choose from {'; '.join(choices)}")
    return list(names or choices)
