"""The draft is loaded while the swarm is being found."""

import asyncio

import pytest

from treeswarm.errors import BadRequest, ModelError, Unreachable
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.opened_client import HEAD_START_S, load_beside

LOAD_S = 4.0


class Opening:
    """A search and a load that take given times of a virtual clock, and what came of them."""

    def __init__(self, search_s: float, *, search_error: Exception | None = None, load_error: Exception | None = None):
        self.search_s, self.search_error, self.load_error = search_s, search_error, load_error
        self.loads = 0
        self.seconds = 0.0

    async def search(self) -> str:
        await asyncio.sleep(self.search_s)
        if self.search_error is not None:
            raise self.search_error
        return "swarm"

    def load(self) -> str:
        self.loads += 1
        if self.load_error is not None:
            raise self.load_error
        return "draft"

    def run(self) -> tuple[str, str]:
        async def work() -> tuple[str, str]:
            clock = asyncio.get_running_loop().time
            start = clock()
            try:
                return await load_beside(self.search(), self.load)
            finally:
                self.seconds = clock() - start

        return run_virtually(work(), work_s=LOAD_S)


@pytest.mark.parametrize(
    ("search_s", "seconds"), [(0.1, 0.1 + LOAD_S), (3.0, HEAD_START_S + LOAD_S), (20.0, 20.0)], ids=str
)
def test_the_search_costs_no_time_besides_the_load(search_s: float, seconds: float) -> None:
    opening = Opening(search_s)
    assert opening.run() == ("swarm", "draft")
    assert opening.seconds == pytest.approx(seconds)


def test_a_quick_error_of_the_search_comes_before_anything_is_loaded() -> None:
    opening = Opening(0.1, search_error=BadRequest("the key is wrong"))
    with pytest.raises(BadRequest, match="the key"):
        opening.run()
    assert opening.loads == 0


def test_a_late_error_of_the_search_does_not_wait_for_the_load() -> None:
    opening = Opening(2.0, search_error=Unreachable("no node answers", "host:1"))
    with pytest.raises(Unreachable):
        opening.run()
    assert opening.seconds == pytest.approx(2.0)


def test_an_error_of_the_load_does_not_wait_for_nodes() -> None:
    opening = Opening(60.0, load_error=ModelError("no such draft"))
    with pytest.raises(ModelError, match="no such draft"):
        opening.run()
    assert opening.seconds == pytest.approx(HEAD_START_S + LOAD_S)
