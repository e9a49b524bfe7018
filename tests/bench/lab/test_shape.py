"""The model of a link delays, drops and orders packets; the tests give the time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.errors import BadRequest
from treeswarm_bench.lab.shape import QUEUE_S, LabLink, LinkModel

PACKETS = st.lists(st.tuples(st.integers(1, 1500), st.floats(0.0, 0.05)), min_size=1, max_size=100)
LINKS = st.builds(
    LabLink,
    delay_s=st.floats(0.0, 0.2),
    jitter_s=st.floats(0.0, 0.3),
    rate_bps=st.one_of(st.none(), st.floats(1e4, 1e9)),
    loss=st.floats(0.0, 0.9),
)


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("", LabLink()),
        ("delay=25ms", LabLink(delay_s=0.025)),
        ("delay=25ms,jitter=2ms,rate=100mbit,loss=0.1%", LabLink(0.025, 0.002, 1e8, 0.001)),
        (" rate=1.5gbit , delay=500us ", LabLink(delay_s=0.0005, rate_bps=1.5e9)),
    ],
)
def test_link_round_trips_through_its_text(text: str, link: LabLink) -> None:
    assert LabLink.parse(text) == link
    assert LabLink.parse(str(link)) == link


@pytest.mark.parametrize("text", ["25ms", "delay=25", "delay=-1ms", "rate=0mbit", "loss=100%", "loss=1", "delay=1..3s"])
def test_bad_link_text_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        LabLink.parse(text)


@given(link=LINKS, packets=PACKETS)
def test_packets_keep_their_order_and_none_is_early(link: LabLink, packets: list[tuple[int, float]]) -> None:
    model, now, last = LinkModel(link), 100.0, 0.0
    for size, pause in packets:
        now += pause
        arrival = model.arrival(size, now)
        if arrival is not None:
            shortest = max(0.0, link.delay_s - link.jitter_s) + (size * 8 / link.rate_bps if link.rate_bps else 0.0)
            assert arrival >= last
            assert arrival >= now + shortest - 1e-9
            last = arrival
    assert model.packets + model.lost + model.dropped == len(packets)


@given(link=LINKS, packets=PACKETS)
def test_same_seed_gives_the_same_arrivals(link: LabLink, packets: list[tuple[int, float]]) -> None:
    first, second = LinkModel(link, seed="7"), LinkModel(link, seed="7")
    assert [first.arrival(*packet) for packet in packets] == [second.arrival(*packet) for packet in packets]


def test_without_rate_jitter_and_loss_only_the_delay_counts() -> None:
    model = LinkModel(LabLink(delay_s=0.025))
    assert [model.arrival(1500, now) for now in (1.0, 1.0, 2.0)] == [1.025, 1.025, 2.025]


def test_link_with_a_rate_sends_one_packet_at_a_time() -> None:
    model = LinkModel(LabLink(delay_s=1.0, rate_bps=80_000.0))
    assert [model.arrival(1000, now) for now in (0.0, 0.0, 10.0)] == pytest.approx([1.1, 1.2, 11.1])


def test_full_queue_drops_new_packets_until_it_has_drained() -> None:
    rate = 1e6
    model = LinkModel(LabLink(rate_bps=rate))
    arrivals = [model.arrival(1250, 0.0) for _ in range(100)]
    kept = [arrival for arrival in arrivals if arrival is not None]
    assert arrivals[: len(kept)] == kept
    assert kept[-1] == pytest.approx(QUEUE_S, abs=2 * 1250 * 8 / rate)
    assert (model.packets, model.dropped) == (len(kept), 100 - len(kept))
    assert model.arrival(1250, 0.1) is not None


def test_slowest_link_still_carries_a_packet() -> None:
    assert LinkModel(LabLink(rate_bps=1000.0)).arrival(1500, 0.0) == pytest.approx(12.0)


def test_share_of_lost_packets_is_the_loss() -> None:
    model = LinkModel(LabLink(loss=0.1), seed="3")
    for now in range(20_000):
        model.arrival(100, float(now))
    assert model.lost / 20_000 == pytest.approx(0.1, abs=0.01)


def test_jitter_spreads_around_the_delay() -> None:
    model = LinkModel(LabLink(delay_s=0.1, jitter_s=0.02))
    delays = [(model.arrival(100, float(now)) or 0.0) - now for now in range(2000)]
    assert 0.08 <= min(delays) < 0.085
    assert 0.115 < max(delays) <= 0.12
    assert sum(delays) / 2000 == pytest.approx(0.1, abs=0.002)


def test_reshaped_link_lets_no_packet_overtake_older_ones() -> None:
    model = LinkModel(LabLink(delay_s=1.0))
    assert model.arrival(100, 0.0) == 1.0
    model.link = LabLink(delay_s=0.1)
    assert model.arrival(100, 0.5) == 1.0
    assert model.arrival(100, 2.0) == 2.1
