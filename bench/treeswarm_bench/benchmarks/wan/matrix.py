"""`swarm bench wan`: ways to decode, side by side over links like the internet's.

The matrix has cells (links, and a slow node) × texts × temperatures.  In each case, every strategy continues the same
prompts.  The strategies take turns for each prompt, so that other load on the machine hits all alike.  What is compared
are ratios within one run.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm.errors import BadRequest
from treeswarm.model_files import read_shape, resolve_model
from treeswarm_bench.bench_client import BenchClient
from treeswarm_bench.benchmarks.common import BenchSetup, BenchSwarm
from treeswarm_bench.benchmarks.texts import repeated_4grams
from treeswarm_bench.benchmarks.wan.cells import CELLS, Cell
from treeswarm_bench.benchmarks.wan.corpora import DEFAULT_TEXTS, MAKERS, Corpus, TextSource, make_corpora, spare_prompt
from treeswarm_bench.benchmarks.wan.goals import MatrixCase, check_goals
from treeswarm_bench.benchmarks.wan.star_baseline import star_transport
from treeswarm_bench.benchmarks.wan.statistics import Sample, Samples, paired, same_text, summary
from treeswarm_bench.benchmarks.wan.strategies import STRATEGIES, Contestant, Strategy
from treeswarm_client.drafters import load_drafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.local_swarm import even_cuts, local_swarm

TEMPERATURES = (0.0, 1.0)
# Where a traversal takes a tenth of a second and more, strategies that buy one token each are timed over fewer tokens.
SLOW_DELAY_S, SLOW_TOKENS = 0.02, 12
LEAST_TOKENS = 6
# For the estimate of the time left: what computing adds to a traversal, and opening a session to a generation.
GUESSED_COMPUTE_S, GUESSED_ROUNDS = 0.08, 12

ReportLine = Callable[[str], None]
OpenCellSwarm = Callable[[BenchSetup, Cell, "MatrixPlan"], contextlib.AbstractAsyncContextManager["CellSwarm"]]
"""Runs the swarm of one cell."""


@dataclass(frozen=True)
class MatrixPlan:
    """What to measure."""

    cells: Sequence[Cell]
    texts: Sequence[str]
    temperatures: Sequence[float]
    strategies: Sequence[Strategy]

    @classmethod
    def of(
        cls,
        cells: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        temperatures: Sequence[float] | None = None,
        strategies: Sequence[str] | None = None,
    ) -> "MatrixPlan":
        """Choose by name; None chooses all, and of texts those of DEFAULT_TEXTS.

        `plain` is always among the strategies, since all figures are relative to it.  Raises BadRequest for an unknown
        name.
        """
        by_cell, by_strategy = {cell.name: cell for cell in CELLS}, {s.name: s for s in STRATEGIES}
        chosen = dict.fromkeys(["plain", *_check_names("strategy", strategies, by_strategy)])
        return cls(
            [by_cell[name] for name in _check_names("cell", cells, by_cell)],
            _check_names("text", texts or DEFAULT_TEXTS, MAKERS),
            list(dict.fromkeys(temperatures or TEMPERATURES)),
            [by_strategy[name] for name in chosen],
        )

    def strategies_for(self, text: str, temperature: float) -> list[Strategy]:
        """Return the strategies that are measured on a text at a temperature."""
        return [
            s
            for s in self.strategies
            if not (s.greedy_only and temperature > 0.0) and not (s.code_only and text != "code")
        ]


async def bench_matrix(
    setup: BenchSetup, plan: MatrixPlan, *, report: ReportLine, open_swarm: OpenCellSwarm | None = None
) -> dict[str, Any]:
    """Measure all of `plan`; `report` is called with lines of progress.

    The swarms are processes on this machine, or what `open_swarm` runs.
    """
    progress = MatrixProgress(plan, setup, report)
    rows: list[dict[str, Any]] = []
    measured: dict[MatrixCase, dict[str, Samples]] = {}
    texts: list[Corpus] = []
    provenance: dict[str, Any] = {}
    for cell in plan.cells:
        async with (open_swarm or _swarm_of_processes)(setup, cell, plan) as swarm:
            texts = texts or await make_corpora(swarm.source, plan.texts)
            await swarm.warm_up(texts, plan)
            for corpus, temperature in itertools.product(texts, plan.temperatures):
                case = MatrixCase(cell.name, corpus.name, temperature)
                measured[case], row = await _measure(swarm, corpus, case, plan)
                rows.append(row)
                progress.finish(case)
            provenance[cell.name] = await swarm.bench.provenance()
    hops = setup.nodes
    return {
        "bench": "wan",
        "what": WHAT,
        "cells": {c.name: _cell_as_dict(c, hops) for c in plan.cells},
        "texts": {t.name: t.as_dict() for t in texts},
        "strategies": {s.name: s.description for s in plan.strategies},
        "identical": all(row["identical"] for row in rows),
        "summary": check_goals(measured, {cell.name: cell.ring_s(hops) for cell in plan.cells}),
        "rows": rows,
        "provenance": provenance,
    }


WHAT = {
    "tokens_per_second": "from a generation's first token to its last; connecting and prefill are in first_token_ms",
    "tokens_per_prompt": "--max-new-tokens × the text's share × the cell's; a strategy that buys one token per "
    "traversal has a constant rate, and generates "
    f"{SLOW_TOKENS} at most where a link has {1e3 * SLOW_DELAY_S:.0f} ms or more",
    "over_plain": "ratio of rates on the same prompts; low and high hold nine of ten draws of a bootstrap over prompts",
    "miss_share": "traversals × the links' configured delays (of a ring; of a star for star) / time",
    "time_share": "of whole generations; drafting that a traversal hides is in none",
    "identical": "every strategy's text is the beginning of the longest, plain's among them",
    "warm_up": "each strategy has generated once before; its drafter and planner go on learning over a cell's texts, "
    "separately for each temperature and for `zero`",
}


@dataclass(eq=False)
class CellSwarm:
    """The swarm of one cell, and the strategies that compete there."""

    bench: BenchSwarm
    cell: Cell
    source: TextSource
    contestants: dict[tuple[str, bool, float], Contestant]
    """Contestants by strategy, misled or not, and temperature: drafters may remember texts; each sees a prompt once."""

    @classmethod
    def of(cls, bench: BenchSwarm, cell: Cell, plan: MatrixPlan, star: BenchClient, drafter: Drafter) -> "CellSwarm":
        """Make the contestants.

        `star` is the client whose hops all go through it; the client of `bench` is for all other strategies.
        """
        contestants = {
            (s.name, misled, temperature): Contestant.of(s, star if s.star else bench.client, drafter, misled=misled)
            for s in plan.strategies
            for misled in (False, True)
            for temperature in plan.temperatures
        }
        setup = bench.setup
        source = TextSource(bench.client, resolve_model(setup.model), setup.dtype, setup.prompts)
        return cls(bench, cell, source, contestants)

    async def warm_up(self, texts: Sequence[Corpus], plan: MatrixPlan) -> None:
        """Let each contestant generate once; of the misled ones, those whose planner learns."""
        prompt = spare_prompt(self.source)
        for (_, misled, temperature), contestant in self.contestants.items():
            competes = any(
                corpus.misled == misled and contestant.strategy in plan.strategies_for(corpus.name, temperature)
                for corpus in texts
            )
            if competes and (contestant.strategy.learns or not misled):
                await contestant.warm_up(prompt, temperature=temperature)

    def contestant(self, strategy: Strategy, corpus: Corpus, temperature: float) -> Contestant:
        return self.contestants[strategy.name, corpus.misled, temperature]

    def tokens(self, strategy: Strategy, corpus: Corpus) -> int:
        """Return the number of tokens to generate for one prompt."""
        tokens = max(LEAST_TOKENS, round(self.bench.setup.tokens * corpus.tokens_share * self.cell.tokens_share))
        slow = strategy.buys_one_token and self.cell.delay_s >= SLOW_DELAY_S
        return min(tokens, SLOW_TOKENS) if slow else tokens


@dataclass(eq=False)
class MatrixProgress:
    """Reports how much is done and how long the rest may take."""

    plan: MatrixPlan
    setup: BenchSetup
    report: ReportLine
    _started: float = field(default_factory=time.perf_counter)
    _done: float = 0.0

    def __post_init__(self) -> None:
        self._all = sum(
            self._weight(MatrixCase(cell.name, text, temperature))
            for cell in self.plan.cells
            for text in self.plan.texts
            for temperature in self.plan.temperatures
        )

    def finish(self, case: MatrixCase) -> None:
        """Report that a case is measured."""
        self._done += self._weight(case)
        spent = time.perf_counter() - self._started
        left = spent * (self._all / self._done - 1.0)
        self.report(f"{self._done / self._all:4.0%}  {case}  ({spent / 60:.1f} min, {left / 60:.1f} left)")

    def _weight(self, case: MatrixCase) -> float:
        cell = next(cell for cell in self.plan.cells if cell.name == case.cell)
        strategies = self.plan.strategies_for(case.text, case.temperature)
        return len(strategies) * (cell.ring_s(self.setup.nodes) + GUESSED_COMPUTE_S) * GUESSED_ROUNDS


def print_to_stderr(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def _swarm_of_processes(setup: BenchSetup, cell: Cell, plan: MatrixPlan) -> AsyncIterator[CellSwarm]:
    model = resolve_model(setup.model)
    drafter = load_drafter(setup.draft, model)
    # Each generation computes its prompt: a prefix that one left on the nodes would spare the next one that work.
    options: dict[str, Any] = {"swarm_key": setup.key, "prefix_scope": "none"}
    spans = even_cuts(read_shape(model).blocks, setup.nodes)
    async with contextlib.AsyncExitStack() as stack:
        nodes = local_swarm(
            setup.model,
            spans,
            dtype=setup.dtype,
            emulate_link=cell.link,
            swarm_key=setup.swarm_key,
            own_flags=cell.node_flags(setup.nodes),
        )
        swarm = await stack.enter_async_context(nodes)
        client = BenchClient(model=setup.model, peers=swarm.peers, emulate_link=cell.link, **options)
        ring = await stack.enter_async_context(client)
        star = ring
        if any(s.star for s in plan.strategies):
            relay = await stack.enter_async_context(star_transport(cell.link, setup.key))
            client = BenchClient(model=setup.model, peers=swarm.peers, transport=relay, **options)
            star = await stack.enter_async_context(client)
        yield CellSwarm.of(BenchSwarm(setup, swarm, ring, cell.link), cell, plan, star, drafter)


async def _measure(
    swarm: CellSwarm, corpus: Corpus, case: MatrixCase, plan: MatrixPlan
) -> tuple[dict[str, Samples], dict[str, Any]]:
    """Run every strategy on every prompt of one case.  Returns samples by strategy, and the case's row."""
    temperature = case.temperature
    strategies = plan.strategies_for(case.text, temperature)
    samples: dict[str, list[Sample]] = {s.name: [] for s in strategies}
    identical, repeats = True, []
    for turn, prompt in enumerate(corpus.prompts):
        texts: dict[str, list[int]] = {}
        # Another strategy goes first for each prompt.
        for strategy in [*strategies[turn % len(strategies) :], *strategies[: turn % len(strategies)]]:
            contestant = swarm.contestant(strategy, corpus, temperature)
            run = await contestant.run(prompt, tokens=swarm.tokens(strategy, corpus), temperature=temperature)
            assert run.stats is not None
            assert run.first_token_s is not None
            samples[strategy.name].append(Sample.of(run.stats, run.first_token_s))
            texts[strategy.name] = run.token_ids
        identical &= same_text(texts)
        repeats.append(repeated_4grams(max(texts.values(), key=len)))
    row = {
        "cell": case.cell,
        "text": case.text,
        "temperature": case.temperature,
        "identical": identical,
        "repeated_4grams": sum(repeats) / len(repeats),
        "strategies": {
            s.name: summary(samples[s.name], _path_s(s, swarm))
            | {"over_plain": paired(samples[s.name], samples["plain"]).as_dict()}
            for s in strategies
        },
    }
    return dict(samples), row


def _path_s(strategy: Strategy, swarm: CellSwarm) -> float:
    hops = swarm.bench.setup.nodes
    return swarm.cell.star_s(hops) if strategy.star else swarm.cell.ring_s(hops)


def _cell_as_dict(cell: Cell, hops: int) -> dict[str, Any]:
    return {
        "link": cell.link,
        "slow_nodes": sorted(cell.slow),
        "tokens_share": cell.tokens_share,
        "ring_ms": 1e3 * cell.ring_s(hops),
        "star_ms": 1e3 * cell.star_s(hops),
    }


def _check_names(kind: str, names: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Return the names without duplicates, or all known ones for None.  Raises BadRequest for an unknown name."""
    choices = list(known)
    for name in names or ():
        if name not in choices:
            raise BadRequest(f"unknown {kind} '{name}': choose from {', '.join(choices)}")
    return list(dict.fromkeys(names or choices))
