"""One session as this node hosts it: link in, device, link or answer out."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from treeswarm.errors import Malformed, Refused, SwarmError, TransportError
from treeswarm.messages import Append, Fault, FaultCode, HopTiming, Open
from treeswarm.session import NodeSession
from treeswarm.steps import Step
from treeswarm.transport.seam import Stream, Transport
from treeswarm_node.device import Computed
from treeswarm_node.engine import Engine, Work
from treeswarm_node.kv import SessionKV
from treeswarm_node.outlets import Outlet, ToClient, ToNextHop

log = logging.getLogger(__name__)


@dataclass(eq=False)
class HostedSession:
    """Everything one session holds on this node.  `fail` and `free` end it; either may be called again."""

    opened: Open
    session: NodeSession
    kv: SessionKV
    control: Stream
    engine: Engine
    transport: Transport
    forget: Callable[[], None]
    """Take it off the node's list."""
    _outbox: asyncio.Queue[tuple[Step, Computed, HopTiming]] = field(default_factory=asyncio.Queue)
    """Bounded by the session's credits: a row's credit returns when it has been sent on."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _over: bool = False

    @property
    def name(self) -> str:
        """Short, for logs."""
        return self.opened.session.hex()[:8]

    def begin(self) -> None:
        """Start passing results on."""
        self._spawn(self._pass_on(self._outlet()))

    async def feed(self, link: Stream) -> None:
        """Take appends from the upstream link until it ends.  Raises what made the session fail."""
        try:
            while (append := await link.receive()) is not None and not self._over:
                if not isinstance(append, Append):
                    raise Refused("a link carries appends after its hello", FaultCode.MALFORMED)
                await self._take(append)
        except TransportError:
            log.info("session %s: the upstream link broke", self.name)
        except SwarmError as error:
            await self.fail(error)
            raise

    async def fail(self, error: SwarmError) -> None:
        """Tell the client why, and free everything."""
        if not self._over:
            log.warning("session %s failed: %s", self.name, error)
            await self._tell(error, fatal=True)
            await self.free()

    async def free(self) -> None:
        """Give the room back, once no forward touches it."""
        if self._over:
            return
        self._over = True
        self.forget()
        self.engine.withdraw(self.session)
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        await self.engine.idle_of(self.session)
        self.kv.close()

    async def _take(self, append: Append) -> None:
        arrived = asyncio.get_running_loop().time()
        try:
            steps = self.session.receive(append)
        except Refused as error:
            if error.code != FaultCode.REPLAYED:
                raise
            await self._tell(error, fatal=False)
            return
        for step in steps:
            self.engine.submit(Work(self.session, self.kv, self.opened.span, step, self._done, arrived))

    def _done(self, step: Step, computed: Computed, timing: HopTiming) -> None:
        if not self._over:
            self._outbox.put_nowait((step, computed, timing))

    async def _pass_on(self, outlet: Outlet) -> None:
        try:
            while True:
                step, computed, timing = await self._outbox.get()
                if computed.error is not None:
                    raise computed.error
                await outlet.send(step, computed, (*step.append.timings, timing))
                self.session.finish(step)
        except SwarmError as error:
            await self.fail(error)
        finally:
            await outlet.end()

    def _outlet(self) -> Outlet:
        if self.opened.next_hop is None:
            return ToClient(self.opened, self.control)
        return ToNextHop(self.opened, self.opened.next_hop, self.transport, lambda error: self._spawn(self.fail(error)))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, error: SwarmError, *, fatal: bool) -> None:
        code = FaultCode.INTERNAL
        if isinstance(error, Refused):
            code = FaultCode(error.code)
        elif isinstance(error, Malformed):
            code = FaultCode.MALFORMED
        elif isinstance(error, TransportError):
            code = FaultCode.DOWNSTREAM
        with contextlib.suppress(SwarmError):
            await self.control.send(Fault(self.opened.session, code, str(error)[:1000], fatal))
