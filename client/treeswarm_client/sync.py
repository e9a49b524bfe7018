"""The synchronous client."""

from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run, Token
from treeswarm_client.loop_thread import LoopThread

T = TypeVar("T")


class SyncSwarmClient:
    """`SwarmClient` for programs without asyncio: `with SyncSwarmClient(model=…, peers=…) as client: …`.

    The asynchronous client runs in a thread of its own.  Any number of threads may use this object at once.
    """

    def __init__(self, **options: Any) -> None:
        """Take the options of `SwarmClient`."""
        self.client = SwarmClient(**options)
        """The asynchronous client.  `run` and `iterate` run its coroutines and generators."""
        self._thread = LoopThread("treeswarm-client")

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.run(self.client.__aenter__())
        except BaseException:
            self._thread.stop(_nothing())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.stop(self.client.__aexit__(kind, error, traceback))

    def close(self) -> None:
        """Close the client, as leaving `with` does: generations that run end, and their callers get BadRequest."""
        self.__exit__(None, None, None)

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Token]:
        """Yield tokens as they are committed.  Takes the options of `SwarmClient.stream`."""
        return self.iterate(self.client.stream(prompt, **options).tokens)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Run:
        """Generate the whole text; the returned Run has `text`, `token_ids` and `stats`."""
        return self.run(self.client.generate(prompt, **options))

    def generate_many(self, prompt: str | Sequence[int], **options: Any) -> list[Run]:
        """Generate `n` samples of one prompt.  Takes the options of `SwarmClient.generate_many`."""
        return self.run(self.client.generate_many(prompt, **options))

    def run(self, job: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the asynchronous client, such as `client.client.overview()`, and return its result."""
        return self._thread.run(job)

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """Yield what an asynchronous generator of the client yields, as it comes."""
        return self._thread.iterate(items)


async def _nothing() -> None:
    return
