"""Several clients at the same nodes share forwards, and one client alone has its own times."""

import pytest

from treeswarm_bench.benchmarks.disturbed import concurrent
from treeswarm_bench.benchmarks.disturbed.concurrent import SharedCase, measure


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrent, "SETTLED_S", 2.0)
    monkeypatch.setattr(concurrent, "WINDOW_S", 3.0)


def test_plain_clients_of_one_node_share_its_forwards() -> None:
    alone, four = (measure(SharedCase("smollm2", "25ms", 1, clients), 0, 0) for clients in (1, 4))
    assert alone["sessions_per_forward"] == 1.0
    assert four["sessions_per_forward"] > 1.5
    assert alone["tokens_per_s"] < four["tokens_per_s"] < 4 * alone["tokens_per_s"]


def test_one_client_is_as_fast_as_its_links_and_forwards() -> None:
    """A plain traversal: two links of 25 ms and a message's 1.9 ms each, and a forward of 3 × 22.9 ms."""
    figures = measure(SharedCase("smollm2", "25ms", 1, 1), 0, 0)
    assert figures["tokens_per_s"] == pytest.approx(1 / (2 * 0.0269 + 3 * 0.0229), rel=0.06)
