"""`swarm bench wan`: ways to decode, side by side over links like the internet's.

Cells (links, and a slow node) × texts × temperatures; in each, every strategy continues the same prompts, in turn for
each prompt, so that whatever else the machine does hits all alike.  What is compared are ratios within one run.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm.errors import BadRequest
from treeswarm.model_files import read_shape, resolve_model
from treeswarm_bench.bench_client import BenchClient
from treeswarm_bench.benchmarks.common import Bench, BenchSetup
from treeswarm_bench.benchmarks.star_baseline import star_transport
from treeswarm_bench.benchmarks.statistics import Sample, Samples, paired, same_text, summary
from treeswarm_bench.benchmarks.strategies import STRATEGIES, Contestant, Strategy
from treeswarm_bench.benchmarks.texts import repeated_4grams
from treeswarm_bench.benchmarks.wan_cells import CELLS, Cell
from treeswarm_bench.benchmarks.wan_targets import Place, checks
from treeswarm_bench.benchmarks.wan_texts import MAKERS, Corpus, Source, corpora, spare_prompt
from treeswarm_client.drafters import load_drafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.local_swarm import even_cuts, local_swarm

TEMPERATURES = (0.0, 1.0)
# Where a traversal takes a tenth of a second and more, whoever buys one token each is timed over fewer.
SLOW_DELAY_S, SLOW_TOKENS = 0.02, 12
LEAST_TOKENS = 6
# For the estimate of what is left: what computing adds to a traversal, and opening a session to a generation.
GUESSED_COMPUTE_S, GUESSED_ROUNDS = 0.08, 12

Say = Callable[[str], None]
FieldOf = Callable[["BenchSetup", Cell, "MatrixPlan"], contextlib.AbstractAsyncContextManager["Field"]]
"""A cell's swarm."""


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
        """By name; None: all.  `plain` is always among the strategies, since all is told relative to it.  Raises
        BadRequest for a name that is none."""
        by_cell, by_strategy = {cell.name: cell for cell in CELLS}, {s.name: s for s in STRATEGIES}
        chosen = dict.fromkeys(["plain", *_known("strategy", strategies, by_strategy)])
        return cls(
            [by_cell[name] for name in _known("cell", cells, by_cell)],
            _known("text", texts, MAKERS),
            list(dict.fromkeys(temperatures or TEMPERATURES)),
            [by_strategy[name] for name in chosen],
        )

    def there(self, text: str, temperature: float) -> list[Strategy]:
        """Who is measured on that text."""
        return [
            s
            for s in self.strategies
            if not (s.greedy_only and temperature > 0.0) and not (s.code_only and text != "code")
        ]


async def bench_internet(
    setup: BenchSetup, plan: MatrixPlan, *, say: Say, field_of: FieldOf | None = None
) -> dict[str, Any]:
    """All of `plan`; `say` hears how far it is.  The swarms are processes on this machine, or whatever `field_of`
    makes."""
    progress = MatrixProgress(plan, setup, say)
    rows: list[dict[str, Any]] = []
    measured: dict[Place, dict[str, Samples]] = {}
    texts: list[Corpus] = []
    provenance: dict[str, Any] = {}
    for cell in plan.cells:
        async with (field_of or _processes)(setup, cell, plan) as field_:
            texts = texts or await corpora(field_.source, plan.texts)
            await field_.warm_up(texts, plan)
            for corpus, temperature in itertools.product(texts, plan.temperatures):
                place = Place(cell.name, corpus.name, temperature)
                measured[place], row = await _measure(field_, corpus, place, plan)
                rows.append(row)
                progress.done(place)
            provenance[cell.name] = await field_.bench.provenance()
    hops = setup.nodes
    return {
        "bench": "wan",
        "what": WHAT,
        "cells": {c.name: _cell_as_dict(c, hops) for c in plan.cells},
        "texts": {t.name: t.as_dict() for t in texts},
        "strategies": {s.name: s.says for s in plan.strategies},
        "identical": all(row["identical"] for row in rows),
        "summary": checks(measured, {cell.name: cell.ring_s(hops) for cell in plan.cells}),
        "rows": rows,
        "provenance": provenance,
    }


WHAT = {
    "tokens_per_second": "from a generation's first token to its last; connecting and prefill are in first_token_ms",
    "tokens_per_prompt": "--max-new-tokens × the text's share × the cell's; of a strategy that buys one token a "
    f"traversal, whose rate is constant, {SLOW_TOKENS} at most where a link has {1e3 * SLOW_DELAY_S:.0f} ms and more",
    "over_plain": "ratio of rates on the same prompts; low and high hold nine of ten draws of a bootstrap over prompts",
    "miss_share": "traversals × the links' configured delays (of a ring; of a star for star) / time",
    "time_share": "of whole generations; drafting that a traversal hides is in none",
    "identical": "every strategy's text is the beginning of the longest, plain's among them",
    "warm_up": "each strategy has generated once before; its drafter and planner go on learning over a cell's texts, "
    "apart for each temperature and for `zero`",
}


@dataclass(eq=False)
class Field:
    """One cell's swarm, and who competes there."""

    bench: Bench
    cell: Cell
    source: Source
    contestants: dict[tuple[str, bool, float], Contestant]
    """By strategy, whether misled, and temperature: drafters may remember texts, and each sees a prompt once."""

    @classmethod
    def of(cls, bench: Bench, cell: Cell, plan: MatrixPlan, star: BenchClient, drafter: Drafter) -> "Field":
        """`star` is the client whose hops all go through it; the bench's own is the other's."""
        contestants = {
            (s.name, misled, temperature): Contestant.of(s, star if s.star else bench.client, drafter, misled=misled)
            for s in plan.strategies
            for misled in (False, True)
            for temperature in plan.temperatures
        }
        setup = bench.setup
        source = Source(bench.client, resolve_model(setup.model), setup.dtype, setup.prompts)
        return cls(bench, cell, source, contestants)

    async def warm_up(self, texts: Sequence[Corpus], plan: MatrixPlan) -> None:
        """Once each; of the misled those who learn."""
        prompt = spare_prompt(self.source)
        for (_, misled, temperature), contestant in self.contestants.items():
            there = any(
                corpus.misled == misled and contestant.strategy in plan.there(corpus.name, temperature)
                for corpus in texts
            )
            if there and (contestant.strategy.plans or not misled):
                await contestant.warm_up(prompt, temperature=temperature)

    def contestant(self, strategy: Strategy, corpus: Corpus, temperature: float) -> Contestant:
        return self.contestants[strategy.name, corpus.misled, temperature]

    def tokens(self, strategy: Strategy, corpus: Corpus) -> int:
        """To generate for one prompt."""
        wanted = max(LEAST_TOKENS, round(self.bench.setup.tokens * corpus.tokens_share * self.cell.tokens_share))
        slow = strategy.one_a_round and self.cell.delay_s >= SLOW_DELAY_S
        return min(wanted, SLOW_TOKENS) if slow else wanted


@dataclass(eq=False)
class MatrixProgress:
    """Says how much is done and how long the rest may take."""

    plan: MatrixPlan
    setup: BenchSetup
    say: Say
    _started: float = field(default_factory=time.perf_counter)
    _done: float = 0.0

    def __post_init__(self) -> None:
        self._all = sum(
            self._weight(Place(cell.name, text, temperature))
            for cell in self.plan.cells
            for text in self.plan.texts
            for temperature in self.plan.temperatures
        )

    def done(self, place: Place) -> None:
        """This place is measured."""
        self._done += self._weight(place)
        spent = time.perf_counter() - self._started
        left = spent * (self._all / self._done - 1.0)
        self.say(f"{self._done / self._all:4.0%}  {place}  ({spent / 60:.1f} min, {left / 60:.1f} left)")

    def _weight(self, place: Place) -> float:
        cell = next(cell for cell in self.plan.cells if cell.name == place.cell)
        strategies = self.plan.there(place.text, place.temperature)
        return len(strategies) * (cell.ring_s(self.setup.nodes) + GUESSED_COMPUTE_S) * GUESSED_ROUNDS


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def _processes(setup: BenchSetup, cell: Cell, plan: MatrixPlan) -> AsyncIterator[Field]:
    model = resolve_model(setup.model)
    drafter = load_drafter(setup.draft, model)
    # Everybody computes the prompt: what the one before left on the nodes would spare the next one that.
    told: dict[str, Any] = {"swarm_key": setup.key, "prefix_scope": "none"}
    spans = even_cuts(read_shape(model).blocks, setup.nodes)
    async with contextlib.AsyncExitStack() as stack:
        swarm = await stack.enter_async_context(
            local_swarm(
                setup.model,
                spans,
                dtype=setup.dtype,
                emulate_link=cell.link,
                swarm_key=setup.swarm_key,
                own_flags=cell.node_flags(setup.nodes),
            )
        )
        ring = await stack.enter_async_context(
            BenchClient(model=setup.model, peers=swarm.peers, emulate_link=cell.link, **told)
        )
        star = ring
        if any(s.star for s in plan.strategies):
            relay = await stack.enter_async_context(star_transport(cell.link, setup.key))
            star = await stack.enter_async_context(
                BenchClient(model=setup.model, peers=swarm.peers, transport=relay, **told)
            )
        yield Field.of(Bench(setup, swarm, ring, cell.link), cell, plan, star, drafter)


async def _measure(
    field_: Field, corpus: Corpus, place: Place, plan: MatrixPlan
) -> tuple[dict[str, Samples], dict[str, Any]]:
    temperature = place.temperature
    strategies = plan.there(place.text, temperature)
    samples: dict[str, list[Sample]] = {s.name: [] for s in strategies}
    identical, repeats = True, []
    for turn, prompt in enumerate(corpus.prompts):
        texts: dict[str, list[int]] = {}
        # Nobody always goes first.
        for strategy in [*strategies[turn % len(strategies) :], *strategies[: turn % len(strategies)]]:
            contestant = field_.contestant(strategy, corpus, temperature)
            run = await contestant.run(prompt, tokens=field_.tokens(strategy, corpus), temperature=temperature)
            assert run.stats is not None
            assert run.first_token_s is not None
            samples[strategy.name].append(Sample.of(run.stats, run.first_token_s))
            texts[strategy.name] = run.token_ids
        identical &= same_text(texts)
        repeats.append(repeated_4grams(max(texts.values(), key=len)))
    row = {
        "cell": place.cell,
        "text": place.text,
        "temperature": place.temperature,
        "identical": identical,
        "repeated_4grams": sum(repeats) / len(repeats),
        "strategies": {
            s.name: summary(samples[s.name], _path_s(s, field_))
            | {"over_plain": paired(samples[s.name], samples["plain"]).as_dict()}
            for s in strategies
        },
    }
    return dict(samples), row


def _path_s(strategy: Strategy, field_: Field) -> float:
    hops = field_.bench.setup.nodes
    return field_.cell.star_s(hops) if strategy.star else field_.cell.ring_s(hops)


def _cell_as_dict(cell: Cell, hops: int) -> dict[str, Any]:
    return {
        "link": cell.link,
        "slow_nodes": sorted(cell.slow),
        "tokens_share": cell.tokens_share,
        "ring_ms": 1e3 * cell.ring_s(hops),
        "star_ms": 1e3 * cell.star_s(hops),
    }


def _known(kind: str, names: Sequence[str] | None, known: Any) -> list[str]:
    """Raises BadRequest."""
    for name in names or ():
        if name not in known:
            raise BadRequest(f"there is no {kind} '{name}': choose from {', '.join(known)}")
    return list(dict.fromkeys(names or known))
