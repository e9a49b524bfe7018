"""The thin synchronous face of the client."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from treeswarm_client.client import SwarmClient
from treeswarm_client.run import Run, Token


class SyncSwarmClient:
    """The same client for programs without asyncio: `with SyncSwarmClient(model=…, peers=…) as client: …`.

    Runs an event loop of its own in the calling thread.
    """

    def __init__(self, **options: Any) -> None:
        self._client = SwarmClient(**options)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        try:
            self._runner.run(self._client.__aenter__())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._runner.run(self._client.__aexit__(kind, error, traceback))
        finally:
            self._runner.close()

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Token]:
        """Tokens as they come; options as `SwarmClient.stream`'s."""
        tokens = aiter(self._client.stream(prompt, **options))
        while (token := self._runner.run(_next(tokens))) is not None:
            yield token

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Run:
        """The whole text at once: see the returned Run's `text`, `token_ids` and `stats`."""
        return self._runner.run(self._client.generate(prompt, **options))

    def generate_many(self, prompt: str | Sequence[int], **options: Any) -> list[Run]:
        """`n` samples of one prompt; options as `SwarmClient.generate_many`'s."""
        return self._runner.run(self._client.generate_many(prompt, **options))


async def _next(tokens: AsyncIterator[Token]) -> Token | None:
    return await anext(tokens, None)
