"""Where the loop runs: a driver must be clearly faster, and not lose by its drafts what it gains by its place."""

import pytest

from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.protocol.spans import Span
from treeswarm_client.discovery.route import Hop
from treeswarm_client.driving.choice import DriverOffer, choose_driver

NONE, TABLES, MODEL = DriverKind.NONE, DriverKind.TABLES, DriverKind.MODEL


def offer(name: str, kind: DriverKind, traversal_s: float) -> DriverOffer:
    return DriverOffer(Hop(name, f"{name}:1", Span(0, 4)), kind, traversal_s)


def chosen(self_s: float, *offers: DriverOffer, own: DriverKind = DriverKind.TABLES, plain: bool = False) -> str | None:
    best = choose_driver(self_s, offers, own, plain=plain)
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
