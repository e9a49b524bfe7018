"""A text that a node drives, as its client sees it: one control stream, a request, and tokens as they come."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from treeswarm.errors import Malformed, NodeLost, Refused, SwarmError
from treeswarm.protocol.drive_messages import Drive, DrivenTokens
from treeswarm.protocol.messages import Fault
from treeswarm.transport.seam import Transport
from treeswarm_client.chain.control_stream import ControlHandlers, NodeControl
from treeswarm_client.discovery.route import Hop

# A driver gives up a chain that it cannot repair within some 30 s, and says so.  One that answers pings and sends
# nothing for longer hangs.
STALL_S = 60.0
# Seconds that the slowest nodes in use need per token of a prompt.
PREFILL_S = 0.1


@dataclass(eq=False)
class RemoteText:
    """Receives the tokens of one text from the node that drives it."""

    hop: Hop
    """The node that drives."""
    request: Drive
    transport: Transport
    on_round_trip: Callable[[str, float], None]
    """Called with the node's id and the seconds of every measured round trip."""
    _received: int = 0
    """Number of tokens so far."""
    _news: "asyncio.Queue[DrivenTokens | SwarmError]" = field(default_factory=asyncio.Queue)

    async def tokens(self) -> AsyncGenerator[DrivenTokens, None]:
        """Yield what each traversal brought, without end; closing the generator ends the text on the node at once.

        Raises the error for which the driver is of no more use: Unreachable, LinkBroken, NodeLost, Refused, Malformed.
        """
        handlers = ControlHandlers(self._on_message, self._on_break, lambda *_: True, self.on_round_trip)
        control = NodeControl(self.hop, self.request.text, handlers)
        try:
            await control.connect(self.transport)
            assert control.stream is not None
            await control.stream.send(self.request)
            patience_s = STALL_S + PREFILL_S * len(self.request.prompt)
            while True:
                yield await self._next(patience_s)
                patience_s = STALL_S
        finally:
            # Shielded, so that a cancelled client still tells the node to stop.
            with contextlib.suppress(SwarmError):
                await asyncio.shield(control.close_session())

    async def _next(self, patience_s: float) -> DrivenTokens:
        try:
            news = await asyncio.wait_for(self._news.get(), patience_s)
        except TimeoutError:
            words = f"the driver {self.hop} sent no token for {patience_s:.0f} s although it answers"
            raise NodeLost(words, self.hop.address) from None
        if isinstance(news, SwarmError):
            raise news
        return news

    def _on_message(self, control: NodeControl, message: object) -> None:
        match message:
            case DrivenTokens(text=text) if text == self.request.text:
                self._received += len(message.tokens)
                # What a driver may send is bounded, so that a dishonest one cannot fill this client's memory.
                if len(message.tokens) and self._received <= self.request.max_new_tokens:
                    self._news.put_nowait(message)
                else:
                    self._news.put_nowait(Malformed(f"the driver {self.hop} sent more tokens than were asked for"))
            case Fault():
                self._news.put_nowait(Refused(f"{self.hop} stopped driving: {message.message}", message.code))
            case _:
                name = type(message).__name__
                self._news.put_nowait(Malformed(f"the driver {self.hop} sent a {name} that was not asked for"))

    def _on_break(self, control: NodeControl, error: SwarmError) -> None:
        self._news.put_nowait(error)
