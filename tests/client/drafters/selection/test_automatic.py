"""`--draft auto`: what the tail proposes comes first, then a draft model that is here, then n-grams."""

from pathlib import Path

import pytest

from treeswarm.model_files import resolve_model
from treeswarm_client.drafters import choose_drafter, choose_without_model
from treeswarm_client.drafters.seam import ProposalReceiver
from treeswarm_client.drafters.selection.automatic import (
    DraftChoice,
    TailOffer,
    choose_model,
    choose_ngrams,
    choose_tail,
    follow_tail,
)

GOOD, UNKNOWN, WEAK = TailOffer("autoregressive", 0.53), TailOffer("other"), TailOffer("autoregressive", 0.17)
DEMO = resolve_model("demo")


@pytest.mark.parametrize(
    ("offer", "name", "why"),
    [
        (
            GOOD,
            "tail+ngram",
            "because the last node of the chain has a speculator (autoregressive, first guess right in 53% of cases)",
        ),
        (UNKNOWN, "tail+ngram", "because the last node of the chain has a speculator (other)"),
        (
            WEAK,
            "demo-draft+ngram",
            "because demo-draft has the tokenizer of demo, and the last node of the chain only has a speculator "
            "(autoregressive, first guess right in 17% of cases)",
        ),
        (None, "demo-draft+ngram", "because demo-draft has the tokenizer of demo"),
    ],
)
def test_auto_takes_the_tail_first_unless_a_model_here_is_better(offer: TailOffer | None, name: str, why: str) -> None:
    drafter, choice = choose_drafter("auto", DEMO, "demo", offer=offer)
    assert choice == DraftChoice(name, why, automatic=True)
    assert isinstance(drafter, ProposalReceiver)
    assert (drafter.proposal_nodes > 0) == (name == "tail+ngram")


@pytest.mark.parametrize(("offer", "name"), [(GOOD, "tail+ngram"), (WEAK, "tail+ngram"), (None, "ngram")])
def test_without_a_draft_model_any_tail_is_better_than_none(
    offer: TailOffer | None, name: str, target_without_draft: Path
) -> None:
    """The drafter listens to the tail in any case, because another tail may come."""
    drafter, choice = choose_drafter("auto", target_without_draft, "org/model", offer=offer)
    assert (choice.name, choice.automatic, choice.fallback) == (name, True, offer is None)
    assert isinstance(drafter, ProposalReceiver)
    assert drafter.proposal_nodes == 128
    assert choose_without_model("a node drives the texts", offer)[1].name == name


@pytest.fixture
def target_without_draft(tmp_path: Path) -> Path:
    """A directory of a model that no draft model is known for."""
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return tmp_path


def test_the_choice_follows_the_tails_that_come_and_go() -> None:
    ngrams, tail, gone = choose_ngrams("there is no other"), choose_tail(GOOD), "the last node of the chain has no"
    assert follow_tail(ngrams, None) == ngrams
    assert follow_tail(ngrams, UNKNOWN) == choose_tail(UNKNOWN)
    assert follow_tail(tail, GOOD) == tail
    assert str(follow_tail(tail, None)) == f"draft: n-grams from the text, because {gone} speculator any more"
    for other in (choose_model("demo-draft", "demo", None), DraftChoice("ngram", "as named")):
        assert follow_tail(other, GOOD) == follow_tail(other, None) == other
