"""The thin synchronous face of the client."""

from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run, Token
from treeswarm_client.loop_thread import LoopThread

T = TypeVar("T")


class SyncSwarmClient:
    """The same client for programs without asyncio: `with SyncSwarmClient(model=…, peers=…) as client: …`.

    The asynchronous client runs in a thread of its own; any number of threads may use this one at once.
    """

    def __init__(self, **options: Any) -> None:
        self.client = SwarmClient(**options)
        """Whose coroutines `run` and `iterate` run."""
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
        """As leaving `with`: generations under way end, their callers get BadRequest."""
        self.__exit__(None, None, None)

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Token]:
        """Tokens as they come; options as `SwarmClient.stream`'s."""
        return self.iterate(self.client.stream(prompt, **options).tokens)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Run:
        """The whole text at once: see the returned Run's `text`, `token_ids` and `stats`."""
        return self.run(self.client.generate(prompt, **options))

    def generate_many(self, prompt: str | Sequence[int], **options: Any) -> list[Run]:
        """`n` samples of one prompt; options as `SwarmClient.generate_many`'s."""
        return self.run(self.client.generate_many(prompt, **options))

    def run(self, job: Coroutine[Any, Any, T]) -> T:
        """Any coroutine of the asynchronous client, such as `client.client.overview()`."""
        return self._thread.run(job)

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """What such a generator yields, as it comes."""
        return self._thread.iterate(items)


async def _nothing() -> None:
    return
