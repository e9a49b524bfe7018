"""What `--draft auto` drafts with: what the tail proposes, a draft model that is here, or n-grams.  Pure."""

from dataclasses import dataclass
from typing import Self

from treeswarm.protocol.records import NodeRecord, speculator_words

WITH_NGRAM = "+ngram"
TAIL = "tail"
"""Names the trees that the chain's tail proposes."""
TAIL_NGRAM = TAIL + WITH_NGRAM
MODELLESS = ("none", "ngram", "auto", TAIL, TAIL_NGRAM)
"""Drafts that need no model."""
# Share of held-out tokens below which a speculator's first guess is worth less than a draft model of the same family
# that is on this machine.  On the bundled pair and code, trees of 64 nodes: n-grams with a head that names 0.49 of the
# tokens bring 4.8 tokens per traversal, with one that names 0.17 some 2.3; with the draft model, which names 0.65, it
# is 5.2 to 7.4 (2026-11-30).  The tail computes its head beside the model, so a client needs no torch for it: above
# this share that counts for more.
WEAK_AGREEMENT = 0.4


@dataclass(frozen=True)
class TailOffer:
    """What the record of a tail says of its speculator."""

    kind: str
    """Kind of the speculator."""
    agreement: float = 0.0
    """Share of held-out tokens that its first guess names, or 0 if that is not known."""

    @classmethod
    def of(cls, record: NodeRecord) -> Self:
        """Return what a record says."""
        return cls(record.speculator, record.agreement)

    @property
    def is_weak(self) -> bool:
        """Whether a draft model that is here guesses better."""
        return 0 < self.agreement < WEAK_AGREEMENT

    def __str__(self) -> str:
        return f"a speculator ({speculator_words(self.kind, self.agreement)})"


@dataclass(frozen=True)
class DraftChoice:
    """Which drafter a client uses, and why."""

    name: str
    """What `--draft` would name it."""
    why: str
    """Reason, as the end of a sentence."""
    automatic: bool = False
    """Whether the client chose it, not the user."""
    fallback: bool = False
    """Whether a draft model would be better, but there is none that fits or can be loaded."""

    def __str__(self) -> str:
        model, plus, _ = self.name.partition(WITH_NGRAM)
        ngrams = "n-grams from the text"
        model = "the tail's proposals" if model == TAIL else model
        words = f"{model} and {ngrams}" if plus else ngrams if model == "ngram" else model
        return f"draft: {words}, {self.why}"

    def as_dict(self) -> dict[str, str]:
        """Return what programs are told."""
        return {"name": self.name, "why": self.why}


def choose_tail(offer: TailOffer) -> DraftChoice:
    """Return the choice of what a tail proposes, together with n-grams."""
    return DraftChoice(TAIL_NGRAM, f"because the last node of the chain has {offer}", automatic=True)


def choose_model(name: str, model: str, offer: TailOffer | None) -> DraftChoice:
    """Return the choice of the draft model `name` for the target `model`; `offer` is what the tail has beside it."""
    beside = f", and the last node of the chain only has {offer}" if offer is not None else ""
    return DraftChoice(name + WITH_NGRAM, f"because {name} has the tokenizer of {model}{beside}", automatic=True)


def choose_ngrams(why: str) -> DraftChoice:
    """Return the choice of n-grams alone; `why` says as a clause why there is no draft model."""
    return DraftChoice("ngram", f"because {why}", automatic=True, fallback=True)


def follow_tail(choice: DraftChoice, offer: TailOffer | None) -> DraftChoice:
    """Return what an automatic choice amounts to with the tail of now.

    Without a draft model the drafter takes n-grams and whatever the tail proposes, so the tail alone decides.
    """
    if not choice.automatic or choice.name not in ("ngram", TAIL_NGRAM):
        return choice
    if offer is not None:
        return choose_tail(offer)
    if choice.name == "ngram":
        return choice
    return choose_ngrams("the last node of the chain has no speculator any more")
