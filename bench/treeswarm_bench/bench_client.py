"""A client whose drafter and generation loop a bench replaces between generations."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from treeswarm_client.client import SwarmClient
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.generation.drafter_pool import DrafterPool
from treeswarm_client.generation.loop import Generation


class BenchClient(SwarmClient):
    """The product's client, with other drafters and other loops."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take the arguments of `SwarmClient`; no node drives unless `drive` says so."""
        super().__init__(*args, **{"drive": "self"} | options)
        self._adapt: Callable[[Generation], Generation] = lambda usual: usual

    def use_drafter(self, drafter: Drafter) -> None:
        """Draft with `drafter` from the next generation on."""
        self._drafters = replace(self._drafters, pool=DrafterPool(drafter, self.drafting.concurrency))

    @contextlib.contextmanager
    def adapted(self, adapt: Callable[[Generation], Generation]) -> Iterator[None]:
        """Within the context, run the loop that `adapt` returns for the usual one.

        The loop may ship as many nodes as the generation's `tree_size` allows.
        """
        before, self._adapt = self._adapt, adapt
        try:
            yield
        finally:
            self._adapt = before

    def _adapt_generation(self, usual: Generation) -> Generation:
        return self._adapt(usual)
