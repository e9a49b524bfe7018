"""The record in which this node tells clients and other nodes what it is and what it hosts."""

from dataclasses import dataclass, replace

from treeswarm import __version__
from treeswarm.keys import Identity
from treeswarm.protocol.address import Address
from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.protocol.join_code import JoinCode
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import UNKNOWN_WEIGHTS, NodeRecord
from treeswarm.protocol.spans import Span
from treeswarm.protocol.text_rules import RULES_VERSION
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo
from treeswarm_node.membership.distances import DistanceSurvey
from treeswarm_node.reachability.reachability import PublicAddress
from treeswarm_node.sessions.server import NodeServer

# Block-rows per second that a node is taken for before it has measured its own speed, which it does before it serves.
GUESSED_RATE = 1000.0
# Seconds that streams, codec and event loop add to a forward, measured by `swarm bench overhead` (docs/benchmarks.md).
OVERHEAD_S = 0.002


@dataclass(eq=False)
class OwnRecord:
    """What this node knows of itself; `make` turns it into a record."""

    config: NodeConfig
    identity: Identity
    model: ModelInfo
    node: NodeServer
    survey: DistanceSurvey
    public: PublicAddress
    """Address at which others find this node."""
    span: Span | None = None
    """Blocks hosted or about to be hosted, or None if none were chosen yet."""
    numerics: NumericsClass | None = None
    """Numerics class of the hosted blocks, or None until weights were read."""

    @property
    def address(self) -> Address:
        """Address at which others find this node."""
        return Address.parse(self.public.address)

    @property
    def numerics_class(self) -> NumericsClass:
        """Numerics class of this node, of unknown weights until it has read them."""
        settings = self.config.model
        unknown = NumericsClass(UNKNOWN_WEIGHTS, settings.dtype, settings.quantization, settings.activations)
        return self.numerics or unknown

    def join_code(self, key_marker: str) -> str:
        """Return the join code of this node; `key_marker` is that of its private swarm, or ""."""
        return str(JoinCode(replace(self.address, pin=self.identity.pin), key_marker))

    def make(self, generation: int, expires: int) -> NodeRecord:
        """Return the record as of now, still without a signature."""
        stage, settings = self.node.stage, self.config.model
        return NodeRecord(
            key=self.identity.public_key,
            generation=generation,
            expires=expires,
            state=self.node.state,
            address=str(self.address.bare),
            pin=self.identity.pin,
            reachable=self.public.reachable,
            name=settings.name[-64:],
            model=self.model.config_digest,
            numerics=self.numerics_class,
            span=self.span or Span(0, self.model.shape.blocks),
            blocks=self.model.shape.blocks,
            rate=stage.rate if stage else GUESSED_RATE,
            hop_s=OVERHEAD_S + (stage.engine.counters.queue_s if stage else 0.0),
            free_tokens=stage.store.free_tokens if stage else 0,
            total_tokens=self.config.device.kv_tokens,
            coordinate=self.survey.coordinate_values(),
            software=f"treeswarm {__version__}",
            driver=DriverKind.NONE if self.node.driver is None else self.node.driver.kind,
            speculator=stage.speculator.name if stage and stage.speculator else "",
            agreement=stage.speculator.agreement if stage and stage.speculator else 0.0,
            tap_head=stage.tap_slice.head if stage and stage.tap_slice else "",
            taps=stage.tap_slice.taps if stage and stage.tap_slice else (),
            rules=RULES_VERSION,
            grammar=stage.grammars.library.name if stage and stage.grammars else "",
        )
