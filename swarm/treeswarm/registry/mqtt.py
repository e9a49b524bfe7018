"""A broker as registry: every node's record is a retained message.

    <namespace>/<model digest>/<node id>        retained, QoS 1: the sealed record
    <namespace>/<model digest>/lost/<node id>   a last will: a hint that the node vanished, and no more than that

The broker and everybody with access to it are believed nothing: only a signed GONE or a record's date make a node
forgotten, and whoever clears or overwrites a record sees it come back.
"""

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from treeswarm.errors import BadRequest, SwarmError, TransportError, Unreachable
from treeswarm.protocol.records import SealedRecord
from treeswarm.registry.book import MAX_NODES, BookRegistry
from treeswarm.registry.spec import Broker

if TYPE_CHECKING:
    import aiomqtt

log = logging.getLogger(__name__)

# A broker calls a silent client lost after 1.5 times this, we a silent broker after twice: 15 and 20 s, at 0.4 bytes
# a second.  (amqtt, a broker in Python, never calls a silent one lost: records expire there as anywhere.)
KEEPALIVE_S = 10
# A connection that takes longer than this, TLS and all, is of no use for a live swarm.
ANSWER_S = 10.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
# Whoever clears a record every moment costs its node one message in this time, not a duel.
MEND_S = 5.0
# Brokers do not say which retained record is the last: this much quiet does (mosquitto sends thousands in it).
QUIET_S = 0.2
QUIETS = 15
MAX_HINTS = 256
# CONNACK's two ways to say no to a user, as paho names them for every version of the protocol.
REFUSED_USER = {4, 5, 134, 135}


@dataclass(eq=False)
class MqttRegistry(BookRegistry):
    """Reads and writes records at a broker; reconnects for ever, and then announces again what it had announced."""

    broker: Broker = field(kw_only=True)
    node: str | None = None
    """Whose last will to leave; None for a mere reader."""
    hints: asyncio.Queue[str] = field(default_factory=lambda: asyncio.Queue(MAX_HINTS))
    """Ids of known nodes that the broker, or anyone, says are lost: worth a probe, worth no more."""
    _own: dict[str, SealedRecord] = field(default_factory=dict)
    _echoed: defaultdict[str, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))
    _tampered: asyncio.Event = field(default_factory=asyncio.Event)
    _client: "aiomqtt.Client | None" = None
    _arrived: int = 0
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    async def start(
        cls, broker: Broker, model: str | None, node: str | None = None, clock: Callable[[], float] = time.time
    ) -> "MqttRegistry":
        """Connect, and read what is there.  Raises BadRequest or Unreachable with the next step."""
        try:
            import aiomqtt  # noqa: F401, PLC0415  # an extra of its own
        except ImportError:
            raise BadRequest("MQTT needs a package more: pip install 'treeswarm[mqtt]'") from None
        registry = cls(model, clock, broker=broker, node=node)
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        registry._tasks = [
            asyncio.create_task(registry._keep_connected(connected)),
            asyncio.create_task(registry._keep_mending()),
        ]
        try:
            await connected
        except BaseException:
            await registry.close()
            raise
        await registry._settle()
        return registry

    async def announce(self, sealed: SealedRecord) -> None:
        """Returns when the broker has shown it to us again.  Raises TransportError, and goes on trying by itself."""
        node = sealed.record.node
        self._own[node] = sealed
        self._echoed[node].clear()
        await self.add_records([sealed.sealed])
        await self._publish(self._topic(sealed), sealed.sealed)
        try:
            await asyncio.wait_for(self._echoed[node].wait(), ANSWER_S)
        except TimeoutError:
            raise TransportError(
                f"{self.broker} took the record of {node} and shows it to nobody: "
                f"let user {self.broker.user or '(anonymous)'} read and write {self.broker.namespace}/#"
            ) from None

    async def withdraw(self, sealed: SealedRecord) -> None:
        self._own.pop(sealed.record.node, None)
        await self.add_records([sealed.sealed])
        topic = self._topic(sealed)
        await self._publish(topic, sealed.sealed)  # whoever listens believes this …
        await self._publish(topic, b"")  # … and whoever comes later has nothing to read

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- the connection ----------------------------------------------------------------------------------------

    async def _keep_connected(self, first: asyncio.Future[None]) -> None:
        pause = FIRST_PAUSE_S
        while True:
            try:
                async with self._connection() as client:
                    pause = FIRST_PAUSE_S
                    if not first.done():
                        first.set_result(None)
                    await self._listen(client)
            except SwarmError as error:
                if not first.done():
                    first.set_exception(error)
                    return
                log.info("%s; trying again in %.1f s", error, pause)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # not all nodes at once
            pause = min(2 * pause, LONGEST_PAUSE_S)

    @contextlib.asynccontextmanager
    async def _connection(self) -> "AsyncIterator[aiomqtt.Client]":
        """Connected, subscribed, and everything of ours announced again: a broker may have lost it."""
        import aiomqtt  # noqa: PLC0415

        tls = await self._knock()
        root = f"{self.broker.namespace}/{self.model or '+'}"
        client = aiomqtt.Client(
            self.broker.host,
            self.broker.port,
            username=self.broker.user,
            password=self.broker.password,
            tls_context=tls,
            will=aiomqtt.Will(f"{root}/lost/{self.node}", b"", qos=1) if self.node and self.model else None,
            keepalive=KEEPALIVE_S,
            timeout=ANSWER_S,
            max_queued_incoming_messages=MAX_NODES,
        )
        try:
            async with client:
                # QoS 0 to us: nothing is lost while the connection lives, a new one begins with all that is retained,
                # and of QoS 1 brokers drop what does not fit their queue (mosquitto: 1000): a large swarm's records.
                granted = await client.subscribe([(f"{root}/+", 0), (f"{root}/lost/+", 0)])
                if any(code.value >= 128 if hasattr(code, "value") else code >= 128 for code in granted):
                    raise BadRequest(
                        f"{self.broker} lets user {self.broker.user or '(anonymous)'} not read: allow it {root}/#"
                    )
                self._client = client
                try:
                    await self._announce_all()
                    yield client
                finally:
                    self._client = None
        except aiomqtt.MqttError as error:
            raise self._translated(error) from error

    async def _knock(self) -> ssl.SSLContext | None:
        """Connect once and hang up.  aiomqtt connects in a thread that nobody can cancel, and blurs what went wrong."""
        tls = ssl.create_default_context(cafile=self.broker.ca) if self.broker.tls else None
        where = f"{self.broker.host}:{self.broker.port}"
        try:
            async with asyncio.timeout(ANSWER_S):
                _, writer = await asyncio.open_connection(self.broker.host, self.broker.port, ssl=tls)
        except ssl.SSLCertVerificationError as error:
            raise BadRequest(
                f"the certificate of {where} is not to be trusted ({error.verify_message}): "
                "check the host's name, or name the broker's own authority with ?ca=/path/ca.pem"
            ) from None
        except ssl.SSLError as error:
            raise BadRequest(
                f"{where} does not speak TLS ({error.reason}): write mqtt://, or give its TLS port"
            ) from None
        except (OSError, TimeoutError) as error:
            raise Unreachable(
                f"no broker answers at {where} ({error or 'timeout'}): check address and firewall"
            ) from None
        writer.transport.abort()
        return tls

    def _translated(self, error: "aiomqtt.MqttError") -> SwarmError:
        code = getattr(error, "rc", None)
        if getattr(code, "value", code) in REFUSED_USER:
            who = f"user '{self.broker.user}'" if self.broker.user else "users without a name"
            return BadRequest(f"{self.broker} refuses {who}: check mqtt://USER:PASSWORD@… in --registry")
        hint = "" if self.broker.tls else "; if that is a TLS port, write mqtts://"
        return Unreachable(f"the broker {self.broker} does not answer as one ({error}){hint}")

    # ---- what comes and goes -----------------------------------------------------------------------------------

    async def _listen(self, client: "aiomqtt.Client") -> None:
        async for message in client.messages:
            *_, kind, node = str(message.topic).split("/")
            payload = message.payload if isinstance(message.payload, bytes) else b""
            if kind == "lost":
                self._hint(node)
            else:
                await self._take(node, payload)

    def _hint(self, node: str) -> None:
        """Only about nodes that are known, and never more than are dealt with: anyone may send these."""
        if self.book.of(node) is not None and not self.hints.full():
            self.hints.put_nowait(node)

    async def _take(self, node: str, payload: bytes) -> None:
        self._arrived += 1
        if payload:  # an empty one clears the topic, and says nothing that is signed
            await self.add_records([payload])
        own = self._own.get(node)
        if own is not None and payload == own.sealed:
            self._echoed[node].set()
        elif own is not None:
            self._tampered.set()

    async def _keep_mending(self) -> None:
        """Put our records back where somebody cleared or overwrote them."""
        while True:
            await self._tampered.wait()
            await asyncio.sleep(MEND_S)
            self._tampered.clear()
            with contextlib.suppress(TransportError):  # the next connection does it
                await self._announce_all()

    async def _announce_all(self) -> None:
        for node in list(self._own):
            if (sealed := self._own.get(node)) is not None:  # as it is now: announcing goes on meanwhile
                await self._publish(self._topic(sealed), sealed.sealed)

    async def _publish(self, topic: str, payload: bytes) -> None:
        import aiomqtt  # noqa: PLC0415

        if self._client is None:
            raise Unreachable(f"the broker {self.broker} is away: this is announced as soon as it is back")
        try:
            await self._client.publish(topic, payload, qos=1, retain=True)
        except aiomqtt.MqttError as error:
            raise self._translated(error) from error

    async def _settle(self) -> None:
        """Wait until the retained records are in."""
        for _ in range(QUIETS):
            seen = self._arrived
            await asyncio.sleep(QUIET_S)
            if seen == self._arrived:
                return

    def _topic(self, sealed: SealedRecord) -> str:
        return f"{self.broker.namespace}/{sealed.record.model}/{sealed.record.node}"
