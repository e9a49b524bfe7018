"""Texts that a node drives are the plain text, whatever becomes of the driver."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from tests.sim.test_recovery import slow_links
from tests.support.driven_swarm import DrivenSwarm, finish
from tests.support.toy_swarm import NUMERICS, SPANS, VOCAB, plain_text, toy_swarm

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import BadRequest
from treeswarm.protocol.drive_messages import Drive, DrivenTokens, DrivenTraversal, DriverKind
from treeswarm.protocol.messages import Close, Fault, FaultCode, NumericsClass
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.topology.coordinates import Coordinate
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import StreamKind
from treeswarm_bench.virtual_clock import run_virtually

PROMPT = [1, 2, 3, 4, 0, 1, 2]
COUNT = 30


def in_swarm(
    test: Callable[[DrivenSwarm], Awaitable[None]], *, spans: list[Span] | None = None, work_s: float = 0.0
) -> None:
    """Run a test in a swarm of toy nodes, two of each span, and check that nothing is left of its sessions."""

    async def run() -> None:
        async with toy_swarm(MemoryNetwork(), spans=spans or [*SPANS, *SPANS]) as toys:
            swarm = DrivenSwarm(toys)
            await asyncio.wait_for(test(swarm), 30_000)
            await asyncio.sleep(1.0)
            swarm.check_idle()

    run_virtually(run(), work_s)


def head_of(swarm: DrivenSwarm) -> str:
    return next(address for address, span in swarm.toys.spans.items() if span.start == 0)


def far_away(swarm: DrivenSwarm, delay_s: float = 0.1) -> EmulatedTransport:
    """Return the transport of a client that is farther from the nodes than they are from one another."""
    return EmulatedTransport(swarm.toys.network.transport(), LinkShape(delay_s))


@pytest.mark.parametrize("tree_size", [0, 4, "auto"])
def test_a_node_drives_the_plain_text(tree_size: int | str) -> None:
    async def test(swarm: DrivenSwarm) -> None:
        driver = swarm.offer(head_of(swarm))
        run = swarm.client(head_of(swarm)).stream(PROMPT, max_new_tokens=COUNT, tree_size=tree_size)
        assert await finish(run) == plain_text(PROMPT, COUNT)
        assert run.text == "".join(map(str, run.token_ids))
        assert (run.finish_reason, driver.driven, run.chain) == ("length", 1, None)
        (use,) = run.drivers
        assert (use.address, use.tokens, use.ended) == (head_of(swarm), COUNT, None)
        assert [hop.span for hop in use.hops] == SPANS
        assert run.stats is not None
        assert (run.stats.committed, run.stats.traversals) == (COUNT, run.recorder.traversals)
        assert (run.stats.drafted > 0) == (tree_size != 0)

    in_swarm(test)


def test_a_driven_text_ends_at_a_stop_token_and_before_a_stop_string() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        swarm.offer(head_of(swarm))
        client, plain = swarm.client(head_of(swarm)), plain_text(PROMPT, COUNT)
        stop = plain[9]
        run = client.stream(PROMPT, max_new_tokens=COUNT, stop_token_ids=[stop])
        assert await finish(run) == plain[: plain.index(stop) + 1]
        assert run.finish_reason == "stop"
        words = "".join(map(str, plain[10:13]))
        stopped = client.stream(PROMPT, max_new_tokens=COUNT, stops=(words,))
        await finish(stopped)
        assert stopped.finish_reason == "stop"
        assert stopped.text == "".join(map(str, plain)).partition(words)[0]

    in_swarm(test)


@pytest.mark.parametrize("committed", [0, 1, 11])
def test_the_text_goes_on_when_its_driver_dies(committed: int) -> None:
    """The driver is the head of the chain too: the client finds another one."""

    async def test(swarm: DrivenSwarm) -> None:
        driver = head_of(swarm)
        swarm.offer(driver)
        run = swarm.client(driver).stream(PROMPT, max_new_tokens=COUNT)
        if committed:
            async for _ in run:
                if len(run.token_ids) >= committed:
                    break
        await swarm.toys.kill(driver)
        del swarm.drivers[driver]
        assert await finish(run) == plain_text(PROMPT, COUNT)
        assert run.chain is not None
        assert driver not in [hop.address for hop in run.chain.hops]
        (use,) = run.drivers
        assert use.ended
        assert use.tokens >= committed
        assert len(run.recorder.recoveries) == bool(use.tokens)
        assert run.stats is not None
        assert run.stats.committed == COUNT

    in_swarm(test)


def test_a_frozen_driver_is_given_up() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        driver = head_of(swarm)
        swarm.offer(driver)
        run = swarm.client(driver).stream(PROMPT, max_new_tokens=COUNT)
        async for _ in run:
            break
        swarm.toys.network.freeze(driver)
        assert await finish(run) == plain_text(PROMPT, COUNT)
        assert "nothing heard" in str(run.drivers[0].ended)
        await swarm.toys.kill(driver)
        del swarm.drivers[driver]

    in_swarm(test)


def test_auto_goes_on_with_another_driver() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        heads = [address for address, span in swarm.toys.spans.items() if span.start == 0]
        for head in heads:
            swarm.offer(head)
        client = swarm.client("auto", far_away(swarm))
        run = client.stream(PROMPT, max_new_tokens=COUNT)
        async for _ in run:
            break
        first = run.drivers[0].address
        await swarm.toys.kill(first)
        del swarm.drivers[first]
        assert await finish(run) == plain_text(PROMPT, COUNT)
        assert [use.address for use in run.drivers] == [first, next(head for head in heads if head != first)]
        assert run.chain is None

    in_swarm(test)


def test_auto_drives_itself_where_that_is_as_fast() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        swarm.offer(head_of(swarm))
        run = swarm.client("auto").stream(PROMPT, max_new_tokens=COUNT)
        assert await finish(run) == plain_text(PROMPT, COUNT)
        assert run.drivers == []
        assert "from here" in run.drive_why

    in_swarm(test)


@pytest.mark.parametrize("tree_size", [0, 4])
@pytest.mark.parametrize(("far_s", "near_s"), [(0.025, 0.025), (0.1, 0.01), (0.025, 0.01), (0.01, 0.025)])
def test_auto_is_never_slower_than_driving_oneself(far_s: float, near_s: float, tree_size: int) -> None:
    """Plain or with trees, with every link of 25 ms too; and it is as much faster as the links say."""

    async def seconds(drive: str) -> tuple[float, float, bool]:
        network, loop = MemoryNetwork(), asyncio.get_running_loop()
        direct = network.transport
        slow_links(network, near_s)
        async with toy_swarm(network) as toys:
            swarm = DrivenSwarm(toys)
            swarm.offer(head_of(swarm))
            # A round trip between two nodes is the sum of their heights.
            swarm.positions = dict.fromkeys(toys.spans, Coordinate(height_s=near_s, error=0.1))
            user = EmulatedTransport(direct(), LinkShape(2 * far_s - near_s))  # the nodes' own half takes near_s
            start = loop.time()
            run = swarm.client(drive, user).stream(PROMPT, max_new_tokens=COUNT, tree_size=tree_size)
            assert await finish(run) == plain_text(PROMPT, COUNT)
            assert run.first_token_s is not None
            whole_s = loop.time() - start
            return whole_s, whole_s - run.first_token_s, bool(run.drivers)

    alone_s, alone_after_first_s, _ = run_virtually(seconds("self"))
    auto_s, auto_after_first_s, driven = run_virtually(seconds("auto"))
    hops = len(SPANS)
    gain = (2 * far_s + (hops - 1) * near_s) / (hops * near_s)
    assert driven == (gain > 1.2)
    # Closing a driven text takes a round trip.
    most_s = 1.05 * alone_after_first_s / gain + 2 * far_s if driven else 1.01 * alone_after_first_s
    assert auto_after_first_s <= most_s
    # The first text of a client waits for two pings, in which it learns its distances.
    assert auto_s < alone_s + (0.0 if driven else 6 * far_s)


def test_self_drives_itself_and_says_so() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        swarm.offer(head_of(swarm))
        run = swarm.client("self", far_away(swarm)).stream(PROMPT, max_new_tokens=COUNT)
        assert await finish(run) == plain_text(PROMPT, COUNT)
        assert (run.drivers, run.drive_why) == ([], "as asked for")

    in_swarm(test)


def test_a_client_that_closes_its_run_ends_the_text_at_once() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        driver = swarm.offer(head_of(swarm))
        run = swarm.client(head_of(swarm)).stream(PROMPT, max_new_tokens=500)
        async for _ in run:
            if len(run.token_ids) >= 5:
                break
        await run.aclose()
        await asyncio.sleep(0.1)
        assert not driver.hosts
        swarm.check_idle()

    in_swarm(test)


def test_a_client_that_vanishes_ends_the_text() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        driver = swarm.offer(head_of(swarm))
        transport = swarm.toys.network.transport()
        run = swarm.client(head_of(swarm), transport).stream(PROMPT, max_new_tokens=500)
        async for _ in run:
            break
        await transport.close()
        await asyncio.sleep(0.1)
        assert not driver.hosts
        await run.aclose()

    in_swarm(test)


def drive(**changes: object) -> Drive:
    """Return a request to drive a text, with some fields changed."""
    fields: dict[str, object] = {
        "version": PROTOCOL_VERSION,
        "text": b"t" * 16,
        "numerics": NUMERICS,
        "prompt": np.array(PROMPT, np.uint32),
        "settings": SamplingSettings(),
        "max_new_tokens": COUNT,
        "stop_ids": np.empty(0, np.uint32),
        "tree_size": 4,
    }
    return Drive(**fields | changes)  # type: ignore[arg-type]


async def first_answer(swarm: DrivenSwarm, *requests: Drive) -> object:
    """Send requests to the first head, and return the first message about the last of them."""
    stream = await swarm.toys.network.transport().connect(head_of(swarm), StreamKind.CONTROL)
    for request in requests:
        await stream.send(request)
    try:
        while True:
            message = await stream.receive()
            assert message is not None
            about = message.session if isinstance(message, Fault) else message.text  # type: ignore[attr-defined, union-attr]
            if about == requests[-1].text:
                return message
    finally:
        await stream.end()


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (drive(version=99), FaultCode.WRONG_VERSION, "protocol 99"),
        (drive(numerics=NumericsClass("other", "float32")), FaultCode.MISMATCH, "their weights differ"),
        (drive(prompt=np.array([VOCAB], np.uint32)), FaultCode.MALFORMED, "outside the vocabulary of 5"),
        (drive(max_new_tokens=5000), FaultCode.MALFORMED, "context"),
    ],
)
def test_a_refusal_to_drive_names_its_reason(request_: Drive, code: FaultCode, words: str) -> None:
    async def test(swarm: DrivenSwarm) -> None:
        swarm.offer(head_of(swarm))
        fault = await first_answer(swarm, request_)
        assert isinstance(fault, Fault)
        assert (fault.code, fault.fatal) == (code, True)
        assert words in fault.message

    in_swarm(test)


@pytest.mark.parametrize(
    ("limits", "words"), [({"texts": 2}, "drives 2 texts"), ({"texts_per_host": 2}, "one address")]
)
def test_a_full_driver_refuses_and_the_client_drives_itself(limits: dict[str, int], words: str) -> None:
    async def test(swarm: DrivenSwarm) -> None:
        head = head_of(swarm)
        swarm.offer(head, **limits)
        client = swarm.client(head)
        runs = [client.stream(PROMPT, max_new_tokens=COUNT, seed=seed) for seed in range(3)]
        texts = await asyncio.gather(*map(finish, runs))
        assert texts == [plain_text(PROMPT, COUNT)] * 3
        refused = [run for run in runs if run.chain is not None]
        assert len(refused) == 1
        assert words in str(refused[0].drivers[0].ended)
        assert "drives no longer" in refused[0].drive_why

    in_swarm(test)


def test_a_node_that_offers_no_driver_refuses_to_drive() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        fault = await first_answer(swarm, drive())
        assert isinstance(fault, Fault)
        assert "drives no texts" in fault.message

    in_swarm(test)


def test_a_close_ends_one_text_and_no_other() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        driver = swarm.offer(head_of(swarm))
        stream = await swarm.toys.network.transport().connect(head_of(swarm), StreamKind.CONTROL)
        for text in (b"a" * 16, b"b" * 16):
            await stream.send(drive(text=text, max_new_tokens=200))
        await stream.send(Close(b"a" * 16))
        await stream.send(drive(text=b"c" * 16, max_new_tokens=200))
        await stream.send(Close(b"c" * 16))  # before it has begun
        tokens = dict.fromkeys((b"a" * 16, b"b" * 16, b"c" * 16), 0)
        while tokens[b"b" * 16] < 200:
            message = await stream.receive()
            assert isinstance(message, DrivenTokens)
            tokens[message.text] += len(message.tokens)
        assert max(tokens[b"a" * 16], tokens[b"c" * 16]) < 200
        await asyncio.sleep(0.1)
        assert not driver.hosts
        await stream.end()

    in_swarm(test)


def test_an_idle_driver_closes_its_client() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        driver = swarm.offer(head_of(swarm), idle_s=100.0)
        running = asyncio.create_task(driver.run())
        await finish(swarm.client(head_of(swarm)).stream(PROMPT, max_new_tokens=COUNT))
        await asyncio.sleep(50.0)
        assert driver.is_open
        await asyncio.sleep(150.0)
        assert not driver.is_open
        assert await finish(swarm.client(head_of(swarm)).stream(PROMPT, max_new_tokens=3)) == plain_text(PROMPT, 3)
        running.cancel()

    in_swarm(test)


def test_a_driver_that_closes_hands_its_texts_back() -> None:
    async def test(swarm: DrivenSwarm) -> None:
        driver = swarm.offer(head_of(swarm))
        run = swarm.client(head_of(swarm)).stream(PROMPT, max_new_tokens=COUNT)
        async for _ in run:
            break
        closing = asyncio.create_task(driver.close())
        assert await finish(run) == plain_text(PROMPT, COUNT)
        assert "about to leave" in str(run.drivers[0].ended)
        await closing

    in_swarm(test)


NO_COSTS = DrivenTraversal(0, 0, 0, 0, 1, 0, 0, False, 0)


def driven(tokens: list[int], text: bytes = b"") -> Callable[[Drive], DrivenTokens]:
    def make(request: Drive) -> DrivenTokens:
        logprobs = np.zeros(len(tokens), np.float32)
        return DrivenTokens(text or request.text, np.array(tokens, np.uint32), logprobs, NO_COSTS)

    return make


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (driven([VOCAB]), "outside the vocabulary"),
        (driven([1] * (COUNT + 1)), "more tokens than"),
        (driven([]), "more tokens than"),
        (driven([1], b"o" * 16), "not asked for"),
        (lambda request: Fault(request.text, FaultCode.INTERNAL, "broken", fatal=True), "broken"),
        (None, "sent no token for"),
    ],
)
def test_a_driver_that_breaks_the_contract_is_left(answer: Callable[[Drive], object] | None, words: str) -> None:
    class DishonestDriver:
        async def drive(self, request: Drive, stream: object) -> None:
            if answer is not None:
                await stream.send(answer(request))  # type: ignore[attr-defined]
            await asyncio.sleep(1e6)

    async def test(swarm: DrivenSwarm) -> None:
        head = head_of(swarm)
        swarm.offers[head] = DriverKind.TABLES
        swarm.toys.nodes[head].driver = DishonestDriver()
        run = swarm.client(head).stream(PROMPT, max_new_tokens=COUNT)
        assert await finish(run) == plain_text(PROMPT, COUNT)
        assert words in str(run.drivers[0].ended)

    in_swarm(test)


@pytest.mark.parametrize(("named", "words"), [("127.0.0.1:1", "is no node"), ("head", "drives no texts")])
def test_a_named_driver_must_offer_to_drive(named: str, words: str) -> None:
    async def test(swarm: DrivenSwarm) -> None:
        other = list(swarm.toys.spans)[-1]
        swarm.offer(other)
        drivers = swarm.client(head_of(swarm) if named == "head" else named).drivers()
        with pytest.raises(BadRequest, match=f"{words}.*{other}"):
            drivers.check()
        swarm.client(other).drivers().check()

    in_swarm(test)
