"""Where the loop runs: a driver must be clearly faster, and not lose by its drafts what it gains by its place."""

import pytest

from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.protocol.spans import Span
from treeswarm_client.discovery.route import Hop
from treeswarm_client.drafters.selection.automatic import DraftChoice, choose_model, choose_ngrams
from treeswarm_client.driving.choice import DraftsHere, DriverOffer, choose_driver, kind_of_draft

TABLES, MODEL, TAIL = DriverKind.TABLES, DriverKind.MODEL, DriverKind.TAIL


def offer(name: str, kind: DriverKind, traversal_s: float) -> DriverOffer:
    return DriverOffer(Hop(name, f"{name}:1", Span(0, 4)), kind, traversal_s)


def chosen(self_s: float, *offers: DriverOffer, own: DriverKind = TABLES, **here: bool) -> str | None:
    best = choose_driver(self_s, offers, DraftsHere(own, **here))
    return best.hop.node if best is not None else None


def test_the_fastest_of_several_drivers_is_chosen() -> None:
    assert chosen(0.22, offer("a", TABLES, 0.075), offer("b", TABLES, 0.03)) == "b"
    assert chosen(0.22) is None


@pytest.mark.parametrize(("driver_s", "expected"), [(0.075, "a"), (0.0899, "a"), (0.0901, None), (0.1, None)])
def test_a_driver_must_gain_a_tenth(driver_s: float, expected: str | None) -> None:
    assert chosen(0.1, offer("a", TABLES, driver_s)) == expected


def test_a_draft_model_is_given_up_for_much_less_distance_only() -> None:
    near, nearer = offer("near", TABLES, 0.075), offer("nearer", TABLES, 0.03)
    assert chosen(0.1, near, own=MODEL) is None
    assert chosen(0.22, near, nearer, own=MODEL) == "nearer"
    assert chosen(0.1, offer("near", MODEL, 0.075), own=MODEL) == "near"


def test_plain_decoding_is_a_matter_of_distance_alone() -> None:
    assert chosen(0.1, offer("near", TABLES, 0.075), own=MODEL, plain=True) == "near"


def test_a_driver_with_a_model_is_preferred_only_by_distance() -> None:
    """What its model is worth for this text is not known."""
    assert chosen(0.22, offer("model", MODEL, 0.05), offer("tables", TABLES, 0.04)) == "tables"


def test_what_the_tail_proposes_counts_like_a_model_for_all_that_take_it() -> None:
    tables, tail = offer("tables", TABLES, 0.06), offer("tail", TAIL, 0.07)
    assert chosen(0.1, tables, tail, own=TAIL, tail_proposes=True) == "tail"
    assert chosen(0.1, tables, tail, own=MODEL, tail_proposes=True) == "tail"
    assert chosen(0.1, tables, own=TAIL, tail_proposes=True) is None
    assert chosen(0.1, tables, tail, own=TAIL) == "tables"
    assert chosen(0.1, tail, own=MODEL) is None


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        (DraftChoice("ngram", "as named"), TABLES),
        (DraftChoice("none", "as named"), TABLES),
        (DraftChoice("tail", "as named"), TAIL),
        (DraftChoice("tail+ngram", "as named"), TAIL),
        (choose_ngrams("there is no other"), TAIL),
        (DraftChoice("demo-draft", "as named"), MODEL),
        (choose_model("demo-draft", "demo", None), MODEL),
    ],
)
def test_a_driver_announces_what_it_drafts_with(choice: DraftChoice, kind: DriverKind) -> None:
    assert kind_of_draft(choice) is kind
