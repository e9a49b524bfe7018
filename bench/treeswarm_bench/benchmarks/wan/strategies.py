"""The strategies that `swarm bench wan` compares: the product's own generation loop, each with another policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from treeswarm.errors import BadRequest
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.walk import Walk
from treeswarm_bench.bench_client import BenchClient
from treeswarm_bench.fixed_size import FixedSizePolicy
from treeswarm_client.drafters.model import DraftOptions, ModelDrafter
from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.drafters.seam import (
    CopyableDrafter,
    Drafter,
    DraftTree,
    ProposalReceiver,
    ShouldStop,
    Verification,
    never_stop,
)
from treeswarm_client.drafters.union import UnionDrafter
from treeswarm_client.generation.loop import Generation
from treeswarm_client.generation.round_in_flight import RoundInFlight
from treeswarm_client.generation.run import Run
from treeswarm_client.planner.policy import LARGEST, AutoPolicy, PlannerMemory, TreePolicy

SEED = 1
# Measurements begin in a session that has lasted a while: connections, caches and τ are warm, and a planner knows its
# chain.
WARM_UP_TOKENS, LEARNER_WARM_UP_TOKENS = 8, 16

MakePolicy = Callable[[Generation, PlannerMemory], TreePolicy]


@dataclass(frozen=True)
class Strategy:
    """One way to decode."""

    name: str
    description: str
    max_nodes: int
    """Number of nodes in its largest tree."""
    policy: MakePolicy
    draft: DraftOptions | Literal["own", "none"] = "own"
    """Way of drafting: as the user asked, not at all, or with the draft model alone under these options."""
    star: bool = False
    """Whether every hop goes through the client."""
    keeps_bonus: bool = True
    learns: bool = False
    """Whether its planner learns."""
    greedy_only: bool = False
    code_only: bool = False

    @property
    def buys_one_token(self) -> bool:
        """Whether it buys one token per traversal whatever the text is, so that a few tokens show its rate."""
        return self.draft == "none"


def _fixed(size: int) -> MakePolicy:
    return lambda _usual, _memory: FixedSizePolicy(size, drafts_ahead=False)


def _auto(*, overlaps: bool) -> MakePolicy:
    return lambda usual, memory: AutoPolicy(
        memory,
        usual.chain.target.row_bytes,
        usual.builder.segment_rows,
        LARGEST,
        overlaps=overlaps,
        clock=usual.clock,
    )


CHAIN = DraftOptions(chain=True)
RAW_CHAIN = DraftOptions(chain=True, ranking="raw", shared_noise=False)
STRATEGIES = (
    Strategy("plain", "one token per traversal, node to node", 0, _fixed(0), draft="none"),
    Strategy(
        "star",
        "one token per traversal, every hop through the client (2H links, as Petals ships)",
        0,
        _fixed(0),
        draft="none",
        star=True,
        greedy_only=True,  # The time of plain decoding depends neither on the text nor on the temperature.
        code_only=True,
    ),
    Strategy(
        "chain-10-no-bonus",
        "a chain of 10 drafted tokens whose bonus token is thrown away, node to node (Petals' speculation, which has "
        "greedy only)",
        10,
        _fixed(10),
        draft=RAW_CHAIN,
        keeps_bonus=False,
        greedy_only=True,
    ),
    Strategy(
        "star-chain-10-no-bonus",
        "the same chain with every hop through the client: Petals with its own speculation",
        10,
        _fixed(10),
        draft=RAW_CHAIN,
        star=True,
        keeps_bonus=False,
        greedy_only=True,
    ),
    Strategy("chain-8", "the draft's best chain of 8", 8, _fixed(8), draft=CHAIN),
    Strategy("tree-16", "trees of 16, one after another", 16, _fixed(16)),
    Strategy("tree-64", "trees of 64, one after another", 64, _fixed(64)),
    Strategy("tree-256", "trees of 256, one after another", 256, _fixed(256)),
    Strategy("auto-sync", "planned trees, one after another", LARGEST, _auto(overlaps=False), learns=True),
    Strategy(
        "auto",
        "planned trees; drafting goes on while they travel, and further nodes follow them",
        LARGEST,
        _auto(overlaps=True),
        learns=True,
    ),
)


@dataclass(eq=False)
class WithoutBonus(Generation):
    """A loop that keeps only drafted tokens that the target agrees with.

    The last of them is shipped again, so the target's next token, although known, must be guessed or bought again.
    Where no guess was right, the target's own token is kept: otherwise the text would never grow.
    """

    async def send_and_walk(self, flight: RoundInFlight) -> tuple[Walk, float]:
        walk, first_s = await super().send_and_walk(flight)
        return (walk if flight.shipment.draft is None else walk_without_bonus(flight.draft, walk)), first_s


def walk_without_bonus(draft: DraftTree, walk: Walk) -> Walk:
    """Return the walk, ended at its last drafted token."""
    if not walk.accepted:
        return walk
    return Walk(walk.accepted[:-1], int(draft.tokens[walk.accepted[-1]]))


@dataclass(frozen=True, eq=False)
class WrappedDrafter:
    """A drafter that passes every call on to another one."""

    inner: Drafter

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def alternatives(self) -> int:
        return self.inner.alternatives

    @property
    def proposal_nodes(self) -> int:
        return self.inner.proposal_nodes if isinstance(self.inner, ProposalReceiver) else 0

    def receive(self, tree: DraftTree) -> None:
        if isinstance(self.inner, ProposalReceiver):
            self.inner.receive(tree)

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        self.inner.begin(prompt, settings)

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        return self.inner.propose(size, depth, should_stop)

    def observe(self, verification: Verification) -> None:
        self.inner.observe(verification)


@dataclass(frozen=True, eq=False)
class MisledDrafter(WrappedDrafter):
    """A drafter as sure of itself as ever whose guesses are wrong.

    Its trees have the very same shape and scores, but every token is half the vocabulary further.  Hits are left to
    chance, and show in the measured acceptance.  The inner drafter observes what was shipped, which the target judged:
    true labels, of nodes that it never had.
    """

    vocab_size: int

    @property
    def name(self) -> str:
        return f"{self.inner.name}, misled"

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        tree = self.inner.propose(size, depth, should_stop)
        return replace(tree, tokens=(tree.tokens + self.vocab_size // 2) % self.vocab_size)


@dataclass(eq=False)
class Contestant:
    """A strategy with a drafter and a planner memory of its own, which last as long as a client would."""

    strategy: Strategy
    client: BenchClient
    drafter: Drafter
    memory: PlannerMemory
    charged: Callable[[TreePolicy], TreePolicy] = lambda policy: policy
    """Returns the policy whose own time counts, where that is not the case by itself."""

    @classmethod
    def of(cls, strategy: Strategy, client: BenchClient, loaded: Drafter, *, misled: bool) -> "Contestant":
        """Make a contestant whose drafter uses the weights of `loaded`, which has drafted nothing yet.

        Raises BadRequest if the strategy needs a draft model and `loaded` has none.
        """
        drafter: Drafter = NoneDrafter()
        if isinstance(strategy.draft, DraftOptions):
            model = _model_in(loaded, strategy)
            drafter = ModelDrafter(
                model.model, model.vocab_size, model.max_positions, options=strategy.draft, name=model.name
            )
        elif strategy.draft == "own":
            assert isinstance(loaded, CopyableDrafter)
            drafter = loaded.copy_for_new_generation()
        if misled and strategy.draft != "none":
            drafter = MisledDrafter(drafter, client.target.vocab_size)
        return cls(strategy, client, drafter, PlannerMemory())

    async def run(self, prompt: Sequence[int], *, tokens: int, temperature: float) -> Run:
        """Run one whole generation, which no stop token ends.  Raises the error that ended it."""
        # The drafter becomes the client's own, because the content of the nodes' answers depends on what it observes.
        self.client.use_drafter(self.drafter)
        with self.client.adapted(self._adapted):
            return await self.client.generate(
                prompt,
                max_new_tokens=tokens,
                temperature=temperature,
                seed=SEED,
                tree_size=self.strategy.max_nodes,
                ignore_eos=True,
            )

    async def warm_up(self, prompt: Sequence[int], *, temperature: float) -> None:
        """Run a short generation, so that the measured ones are not the first of their kind."""
        tokens = LEARNER_WARM_UP_TOKENS if self.strategy.learns else WARM_UP_TOKENS
        await self.run(prompt, tokens=tokens, temperature=temperature)

    def _adapted(self, usual: Generation) -> Generation:
        loop = Generation if self.strategy.keeps_bonus else WithoutBonus
        return loop(
            chain=usual.chain,
            drafter=usual.drafter,
            builder=usual.builder,
            limits=usual.limits,
            policy=self.charged(self.strategy.policy(usual, self.memory)),
            recorder=usual.recorder,
            clock=usual.clock,
        )


def _model_in(loaded: Drafter, strategy: Strategy) -> ModelDrafter:
    members = loaded.members if isinstance(loaded, UnionDrafter) else [loaded]
    model = next((member for member in members if isinstance(member, ModelDrafter)), None)
    if model is None:
        raise BadRequest(f"{strategy.name} drafts with a model: name one with --draft, or leave it out of --strategies")
    return model
