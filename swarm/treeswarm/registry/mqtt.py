"""An MQTT broker as registry: the record of each node is a retained message.

    <namespace>/<model digest>/<node id>        retained, QoS 1: the sealed record
    <namespace>/<model digest>/lost/<node id>   a last will: a hint that the node may have vanished

The broker and its users are not trusted.  A node is forgotten only when its signed GONE record arrives, or when its
record expires.  A record that someone clears or overwrites is published again by its node.
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
from functools import partial
from typing import TYPE_CHECKING

from treeswarm.errors import BadRequest, SwarmError, TransportError, Unreachable
from treeswarm.extras import require
from treeswarm.protocol.records import SealedRecord
from treeswarm.registry.book import MAX_NODES, BookRegistry
from treeswarm.registry.spec import Broker
from treeswarm.tasks import STAGGER_S, TaskSet, keep_running

if TYPE_CHECKING:
    import aiomqtt

log = logging.getLogger(__name__)

# A broker calls a silent client lost after 1.5 times this, we a silent broker after twice: 15 and 20 s, at 0.4 bytes
# per second.  (amqtt, a broker in Python, never calls a silent client lost: records expire there as everywhere.)
KEEPALIVE_S = 10
# A connection that takes longer than this, with TLS, is of no use for a live swarm.
ANSWER_S = 10.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
# An attacker who clears a record again and again makes its node send one message per this many seconds.
REPUBLISH_S = 5.0
# Brokers do not mark the last retained record.  So many seconds without a record do; mosquitto sends thousands of
# records in this time.
QUIET_S = 0.2
MAX_QUIET_CHECKS = 15
# The two CONNACK codes that refuse a user, as paho numbers them for every version of the protocol.
REFUSED_USER = {4, 5, 134, 135}


@dataclass(eq=False)
class BrokerConnection:
    """Connects to a broker, and translates the errors of aiomqtt."""

    broker: Broker
    root: str
    """Topic above the topics of the nodes."""
    will_topic: str | None = None
    """Topic of the last will, or None for a client that only reads."""
    client: "aiomqtt.Client | None" = None
    """The connected client, or None while there is no connection."""

    @contextlib.asynccontextmanager
    async def open(self) -> "AsyncIterator[aiomqtt.Client]":
        """Connect and subscribe for the duration of the context.  Raises BadRequest, Unreachable."""
        import aiomqtt  # noqa: PLC0415

        tls = await self._probe()
        client = aiomqtt.Client(
            self.broker.host,
            self.broker.port,
            username=self.broker.user,
            password=self.broker.password,
            tls_context=tls,
            will=aiomqtt.Will(self.will_topic, b"", qos=1) if self.will_topic else None,
            keepalive=KEEPALIVE_S,
            timeout=ANSWER_S,
            max_queued_incoming_messages=MAX_NODES,
        )
        try:
            async with client:
                # We subscribe with QoS 0.  Nothing is lost while the connection lives, and a new connection begins with
                # everything that is retained.  With QoS 1, brokers drop what does not fit their queue (mosquitto:
                # 1000 messages): records of a large swarm.
                granted = await client.subscribe([(f"{self.root}/+", 0), (f"{self.root}/lost/+", 0)])
                if any(code.value >= 128 if hasattr(code, "value") else code >= 128 for code in granted):
                    raise BadRequest(
                        f"{self.broker} does not let user {self.broker.user or '(anonymous)'} read: "
                        f"allow reading {self.root}/#"
                    )
                self.client = client
                try:
                    yield client
                finally:
                    self.client = None
        except aiomqtt.MqttError as error:
            raise self._translated(error) from error

    async def publish(self, topic: str, payload: bytes) -> None:
        """Publish a retained message.  Raises BadRequest, Unreachable."""
        import aiomqtt  # noqa: PLC0415

        if self.client is None:
            raise Unreachable(
                f"no connection to the broker {self.broker}: the record is announced as soon as it is back"
            )
        try:
            await self.client.publish(topic, payload, qos=1, retain=True)
        except aiomqtt.MqttError as error:
            raise self._translated(error) from error

    async def _probe(self) -> ssl.SSLContext | None:
        """Connect once and disconnect, and return the TLS context to use.

        aiomqtt connects in a thread that cannot be cancelled, and its errors do not tell what went wrong.
        """
        tls = ssl.create_default_context(cafile=self.broker.ca) if self.broker.tls else None
        address = f"{self.broker.host}:{self.broker.port}"
        try:
            async with asyncio.timeout(ANSWER_S):
                _, writer = await asyncio.open_connection(
                    self.broker.host, self.broker.port, ssl=tls, happy_eyeballs_delay=STAGGER_S
                )
        except ssl.SSLCertVerificationError as error:
            raise BadRequest(
                f"the certificate of {address} is not trusted ({error.verify_message}): "
                "check the host's name, or name the broker's own authority with ?ca=/path/ca.pem"
            ) from None
        except ssl.SSLError as error:
            raise BadRequest(
                f"{address} does not speak TLS ({error.reason}): write mqtt://, or give its TLS port"
            ) from None
        except (OSError, TimeoutError) as error:
            raise Unreachable(
                f"no broker answers at {address} ({error or 'timeout'}): check address and firewall"
            ) from None
        writer.transport.abort()
        return tls

    def _translated(self, error: "aiomqtt.MqttError") -> SwarmError:
        code = getattr(error, "rc", None)
        if getattr(code, "value", code) in REFUSED_USER:
            user = f"user '{self.broker.user}'" if self.broker.user else "anonymous users"
            return BadRequest(f"{self.broker} refuses {user}: check mqtt://USER:PASSWORD@… in --registry")
        advice = "check the address" if self.broker.tls else "check the address; if that is a TLS port, write mqtts://"
        return Unreachable(f"{self.broker} does not answer as an MQTT broker ({error}): {advice}")


@dataclass(eq=False)
class MqttRegistry(BookRegistry):
    """Reads and writes records at a broker.

    It reconnects for as long as it is open, and then announces again what it announced before.
    """

    broker: Broker = field(kw_only=True)
    node: str | None = None
    """Id of the node that leaves a last will, or None for a client that only reads."""
    _connection: BrokerConnection = field(init=False)
    _own: dict[str, SealedRecord] = field(default_factory=dict)
    """Announced records by node id."""
    _echoed: defaultdict[str, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))
    """Events by node id, set when the broker has sent the node's latest record back."""
    _tampered: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the broker sends something else than an announced record under its topic."""
    _arrived: int = 0
    """Number of records that the broker has sent."""
    _tasks: TaskSet = field(default_factory=TaskSet)

    def __post_init__(self) -> None:
        super().__post_init__()
        root = f"{self.broker.namespace}/{self.model or '+'}"
        will_topic = f"{root}/lost/{self.node}" if self.node and self.model else None
        self._connection = BrokerConnection(self.broker, root, will_topic)

    @classmethod
    async def start(
        cls, broker: Broker, model: str | None, node: str | None = None, clock: Callable[[], float] = time.time
    ) -> "MqttRegistry":
        """Connect, and read the retained records.  Raises BadRequest or Unreachable with the next step."""
        require("mqtt", "a registry with MQTT")
        registry = cls(model, clock, broker=broker, node=node)
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        registry._tasks.start(
            keep_running("staying connected to the broker", partial(registry._keep_connected, connected))
        )
        registry._tasks.start(keep_running("announcing again", registry._keep_republishing))
        try:
            await connected
        except BaseException:
            await registry.close()
            raise
        await registry._settle()
        return registry

    async def announce(self, sealed: SealedRecord) -> None:
        """Announce a record, and return when the broker has sent it back.

        Raises TransportError, and goes on trying in the background.
        """
        node = sealed.record.node
        self._own[node] = sealed
        self._echoed[node].clear()
        await self.add_records([sealed.sealed])
        await self._connection.publish(self._topic(sealed), sealed.sealed)
        try:
            await asyncio.wait_for(self._echoed[node].wait(), ANSWER_S)
        except TimeoutError:
            raise TransportError(
                f"{self.broker} accepted the record of {node} and does not pass it on: "
                f"let user {self.broker.user or '(anonymous)'} read and write {self.broker.namespace}/#"
            ) from None

    async def withdraw(self, sealed: SealedRecord) -> None:
        self._own.pop(sealed.record.node, None)
        await self.add_records([sealed.sealed])
        topic = self._topic(sealed)
        await self._connection.publish(topic, sealed.sealed)  # For those that are subscribed now …
        await self._connection.publish(topic, b"")  # … and nothing is retained for those that subscribe later.

    async def close(self) -> None:
        await self._tasks.close()

    # ---- the connection ----------------------------------------------------------------------------------------

    async def _keep_connected(self, first: asyncio.Future[None]) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with self._connection.open() as client:
                    await self._announce_all()  # The broker may have lost our records.
                    pause_s = FIRST_PAUSE_S
                    if not first.done():
                        first.set_result(None)
                    await self._listen(client)
            except SwarmError as error:
                if not first.done():
                    first.set_exception(error)
                    return
                log.info("%s; trying again in %.1f s", error, pause_s)
            except Exception as error:  # A bug: the caller waits for the first connection and must learn of it.
                if not first.done():
                    first.set_exception(error)
                    return
                raise
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # Not all nodes reconnect at the same time.
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _settle(self) -> None:
        """Wait until the retained records have arrived."""
        for _ in range(MAX_QUIET_CHECKS):
            arrived = self._arrived
            await asyncio.sleep(QUIET_S)
            if arrived == self._arrived:
                return

    # ---- records in and out ------------------------------------------------------------------------------------

    async def _listen(self, client: "aiomqtt.Client") -> None:
        async for message in client.messages:
            *_, level, node = str(message.topic).split("/")
            payload = message.payload if isinstance(message.payload, bytes) else b""
            if level == "lost":
                self.hint(node)
            else:
                await self._receive(node, payload)

    async def _receive(self, node: str, payload: bytes) -> None:
        self._arrived += 1
        if payload:  # An empty message clears the topic and is not signed, so it is ignored.
            await self.add_records([payload])
        own = self._own.get(node)
        if own is not None and payload == own.sealed:
            self._echoed[node].set()
        elif own is not None:
            self._tampered.set()

    async def _keep_republishing(self) -> None:
        """Publish our records again where someone has cleared or overwritten them."""
        while True:
            await self._tampered.wait()
            await asyncio.sleep(REPUBLISH_S)
            self._tampered.clear()
            with contextlib.suppress(TransportError):  # If this fails, the next connection announces all records.
                await self._announce_all()

    async def _announce_all(self) -> None:
        for node in list(self._own):
            if (sealed := self._own.get(node)) is not None:  # The latest one: announcing continues meanwhile.
                await self._connection.publish(self._topic(sealed), sealed.sealed)

    def _topic(self, sealed: SealedRecord) -> str:
        return f"{self.broker.namespace}/{sealed.record.model}/{sealed.record.node}"
