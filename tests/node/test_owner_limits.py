"""An owner can limit a node to some hours of the day and to a part of the line's rate."""

import asyncio
import contextlib
import urllib.request
from datetime import datetime, time, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.registry_media import free_port

from treeswarm.errors import BadRequest
from treeswarm.protocol.spans import Span
from treeswarm.transport.rate_limit import LEAST_RATE, MOST_DEBT_S, RateLimiter
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.local_swarm import local_swarm, node_command
from treeswarm_node.cli.arguments import read_config
from treeswarm_node.reachability.tcp_splice import MAX_HOLD_S, READ_BYTES, ByteCounter
from treeswarm_node.schedule import Schedule, follow_schedule

TIME = st.times().map(lambda t: t.replace(second=0, microsecond=0))


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22:00-07:00", ["22:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "21:59"]),
        ("09:30-17:00", ["09:30", "12:00", "16:59"], ["17:00", "23:00", "00:00", "09:29"]),
        ("9:00-00:00", ["09:00", "23:59"], ["00:00", "08:59"]),
        ("00:00-06:00", ["00:00", "05:59"], ["06:00", "23:59"]),
    ],
)
def test_hours_may_include_midnight(text: str, inside: list[str], outside: list[str]) -> None:
    hours = Schedule.parse(text)
    assert all(hours.includes(time.fromisoformat(at)) for at in inside)
    assert not any(hours.includes(time.fromisoformat(at)) for at in outside)


@given(start=TIME, end=TIME, now=TIME)
def test_every_time_is_within_the_hours_or_the_rest_of_the_day(start: time, end: time, now: time) -> None:
    if start != end:
        hours, rest = Schedule(start, end), Schedule(end, start)
        assert hours.includes(now) != rest.includes(now)
        assert hours.includes(start)
        assert not hours.includes(end)
        assert Schedule.parse(str(hours)) == hours


@pytest.mark.parametrize("text", ["", "22-7", "24:00-01:00", "22:60-01:00", "22:00", "12:00-12:00", "22:00-07:00 CET"])
def test_invalid_hours_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="--hours"):
        Schedule.parse(text)


def test_orders_come_only_when_the_hours_begin_or_end() -> None:
    began = datetime(2026, 3, 1, 21, 0)

    async def day_and_a_half() -> list[tuple[str, str]]:
        loop = asyncio.get_running_loop()
        orders: asyncio.Queue[str] = asyncio.Queue(4)
        received = list[tuple[str, str]]()

        def clock() -> datetime:
            return began + timedelta(seconds=loop.time())

        keeping = asyncio.create_task(follow_schedule(Schedule.parse("22:00-07:00"), orders, clock))
        try:
            async with asyncio.timeout(36 * 3600):
                while True:
                    order = await orders.get()
                    received.append((f"{clock():%d %H:%M}", order))
        except TimeoutError:
            return received
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    assert run_virtually(day_and_a_half()) == [
        ("01 21:00", "pause"),
        ("01 22:00", "resume"),
        ("02 07:00", "pause"),
        ("02 22:00", "resume"),
        ("03 07:00", "pause"),
    ]


@given(
    rate=st.floats(LEAST_RATE, 1e10),
    sends=st.lists(
        st.tuples(st.integers(0, 1 << 20), st.floats(0, 2), st.none() | st.floats(0, 5)), min_size=1, max_size=30
    ),
)
def test_sending_keeps_to_the_rate_and_cancelled_sends_are_free(
    rate: float, sends: list[tuple[int, float, float | None]]
) -> None:
    """`sends` has bytes, seconds since the send before, and seconds until it is cancelled, or None."""

    async def send_all() -> list[tuple[float, int]]:
        loop, limiter, sent = asyncio.get_running_loop(), RateLimiter(rate), list[tuple[float, int]]()

        async def send(size: int, patience: float | None) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await limiter.acquire(size)
                    sent.append((loop.time(), size))

        sending = list[asyncio.Task[None]]()
        for size, later, patience in sends:
            await asyncio.sleep(later)
            sending.append(asyncio.create_task(send(size, patience)))
        await asyncio.gather(*sending)
        return sent

    sent = run_virtually(send_all())
    assert sum(patience is None for _, _, patience in sends) <= len(sent)
    for i, (first, size) in enumerate(sent):
        total = size
        for at, more in sent[i + 1 :]:
            assert 8 * total <= (at - first + 1e-7) * rate + 1e-3  # Timers fire up to a nanosecond early.
            total += more
    # The line was never idle while a send waited, so cancelled sends left no gap.
    began = sum(later for _, later, _ in sends)
    assert not sent or sent[-1][0] <= began + 8 * sum(size for _, size in sent) / rate + 1e-6


def test_debt_ends_when_idle_and_is_limited_for_heartbeats() -> None:
    limiter = RateLimiter(8e6)
    limiter.charge(1_000_000, 0.0)
    assert limiter.owed_s(0.25) == 0.75
    assert limiter.owed_s(100.0) == 0.0
    for _ in range(100):
        limiter.charge(1_000_000, 200.0)
    assert limiter.owed_s(200.0) == MOST_DEBT_S
    limiter.charge(10_000_000, 300.0)
    limiter.charge(100, 300.0)
    assert limiter.owed_s(300.0) == 10.0, "a heartbeat must not shorten the debt"


def test_bytes_through_lent_ports_count_towards_the_rate() -> None:
    limiter = RateLimiter(8e6)
    ports = [ByteCounter(0, limiter), ByteCounter(500_000, limiter)]
    assert ports[0].count(500_000, 0.0) == 0.5
    assert ports[1].count(1_000_000, 0.0) == 2.0
    assert ports[1].count(1_000_000, 2.0) == 2.0
    assert limiter.owed_s(2.0) == 1.0


def test_a_borrowers_heartbeats_do_not_wait_for_the_lender() -> None:
    limiter = RateLimiter(LEAST_RATE)
    limiter.charge(1 << 20, 0.0)
    port = ByteCounter(0, limiter)
    assert port.count(100, 0.0) == 0.0
    assert port.count(READ_BYTES, 0.0) == MAX_HOLD_S


def test_flags_of_owner_limits_are_checked() -> None:
    config = read_config(["demo", "--bandwidth", "20mbit", "--hours", "22:00-07:00"], {})
    assert config.network.bandwidth == 20e6
    assert str(config.operations.hours) == "22:00-07:00"
    for text, error in (("20", "is no rate"), ("800kbit", "too little to take part"), ("0mbit", "too little")):
        with pytest.raises(BadRequest, match=error):
            read_config(["demo", "--bandwidth", text], {})


async def test_a_node_loads_and_serves_only_within_its_hours() -> None:
    now, port = datetime.now(), free_port()
    later, much_later = (f"{now + timedelta(hours=h):%H:%M}" for h in (3, 6))
    earlier = f"{now - timedelta(hours=3):%H:%M}"
    flags = ("--kv-tokens", "1024", "--registry", "none", "--metrics")
    waits = (*flags, f"127.0.0.1:{port}", "--listen", "127.0.0.1:0", "--hours", f"{later}-{much_later}")
    waiting = await asyncio.create_subprocess_exec(
        *(*node_command(), "demo", *waits), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    serves = (*flags, "127.0.0.1:0", "--hours", f"{earlier}-{later}")
    try:
        async with local_swarm("demo", [Span(0, 1)], flags=serves) as swarm:
            assert await state(swarm.nodes[0].ready["metrics"]) == "online"
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(OSError):
                    assert await state(f"http://127.0.0.1:{port}/metrics") == "paused"
                    break
                await asyncio.sleep(0.2)
    finally:
        waiting.terminate()
        output, errors = await waiting.communicate()
    assert waiting.returncode == 0
    assert output == b"", "the node was never ready"
    assert b"waiting until the hours" in errors


async def state(url: str) -> str:
    """Return the node's state as Prometheus reads it."""

    def read() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read(), "utf-8")

    lines = (await asyncio.to_thread(read)).splitlines()
    return next(
        line.split('"')[1] for line in lines if line.startswith("treeswarm_node_state{") and line.endswith(" 1.0")
    )
