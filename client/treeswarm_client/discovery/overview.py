"""An overview of a swarm as one client sees it: models, blocks, gaps, nodes.  Pure over records and measurements."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import UNKNOWN_WEIGHTS, NodeRecord, NodeState
from treeswarm.protocol.spans import Span, missing_blocks
from treeswarm.registry.diagnosis import NORMAL
from treeswarm_client.discovery.gap import DOING, list_some

# Names chosen by other owners are shown on a terminal; no honest one is longer.
LONGEST_TEXT = 200


@dataclass(frozen=True)
class Probe:
    """The result of pinging a node."""

    latency_s: float | None
    """Round-trip time in seconds on an open stream, or None if the node did not answer."""
    reason: str = ""
    """Why the node did not answer, or empty if it did."""


@dataclass(frozen=True)
class ModelFilter:
    """The one model to show."""

    name: str
    """Name that the user gave the model."""
    digest: str
    """Digest of the model's config."""
    blocks: int
    """Number of decoder blocks."""


@dataclass(frozen=True)
class NodeView:
    """One node.  Rate, times and room are as the node announced them; `probe` is what this client measured."""

    id: str
    address: str
    span: Span
    state: NodeState
    reachable: bool
    rate: float
    hop_s: float
    free_tokens: int
    total_tokens: int
    software: str
    driver: DriverKind = DriverKind.NONE
    """Whether the node drives texts for clients, and with what it drafts."""
    speculator: str = ""
    """Kind of the speculator that proposes trees there, or "" if there is none."""
    agreement: float = 0.0
    """Share of held-out tokens that its first guess names, or 0 if that is not known."""
    probe: Probe | None = None
    """Result of the last ping, or None if the node was not pinged yet."""

    @property
    def silent(self) -> bool:
        """Whether the node was pinged and did not answer."""
        return self.probe is not None and self.probe.latency_s is None

    @property
    def serves(self) -> bool:
        """Whether this client could open a session on the node, if it has room.

        A record outlives its node by minutes, so a node that does not answer does not serve.
        """
        return self.state is NodeState.ONLINE and not self.silent

    @property
    def doing(self) -> str:
        """What a node does that does not serve, with its blocks, as a sentence about a gap says it."""
        return f"with {self.span} does not answer" if self.silent else f"{DOING.get(self.state, 'serves')} {self.span}"

    @property
    def load(self) -> float | None:
        """Share of the node's room that sessions have reserved, or None if it announced no room."""
        return min(1.0, max(0.0, 1 - self.free_tokens / self.total_tokens)) if self.total_tokens > 0 else None

    @property
    def latency_ms(self) -> float | None:
        """Round-trip time in milliseconds, or None if there is no answer."""
        return None if self.probe is None or self.probe.latency_s is None else self.probe.latency_s * 1e3

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "id": self.id,
            "address": self.address,
            "blocks": str(self.span),
            "state": self.state.value,
            "serves": self.serves,
            "reachable": self.reachable,
            "latency_ms": None if self.latency_ms is None else round(self.latency_ms, 3),
            "why_silent": self.probe.reason if self.probe is not None and self.silent else None,
            "load": self.load,
            "free_tokens": self.free_tokens,
            "total_tokens": self.total_tokens,
            "hop_s": self.hop_s,
            "rate": self.rate,
            "software": self.software,
            "driver": self.driver.name.lower(),
            "speculator": self.speculator or None,
            "agreement": self.agreement or None,
        }


@dataclass(frozen=True)
class ClassView:
    """Nodes of one numerics class, which compute the same text, in the order of their spans."""

    numerics: NumericsClass
    blocks: int
    nodes: tuple[NodeView, ...]

    @cached_property
    def replicas(self) -> tuple[int, ...]:
        """Number of nodes that serve each block."""
        steps = [0] * (self.blocks + 1)
        for node in self.nodes:
            if node.serves:
                steps[node.span.start] += 1
                steps[node.span.end] -= 1
        return tuple(accumulate(steps))[: self.blocks]

    @cached_property
    def gaps(self) -> tuple[Span, ...]:
        """Blocks that no node serves."""
        return tuple(missing_blocks([node.span for node in self.nodes if node.serves], self.blocks))

    @property
    def weakest(self) -> int:
        """Number of replicas of the block that has fewest."""
        return min(self.replicas)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "weights": self.numerics.weights,
            "dtype": self.numerics.dtype,
            "quantization": self.numerics.quantization,
            "activations": self.numerics.activations or "native",
            "covered": not self.gaps,
            "gaps": [str(gap) for gap in self.gaps],
            "replicas": list(self.replicas),
            "nodes": [node.as_dict() for node in self.nodes],
        }


@dataclass(frozen=True)
class ModelView:
    """A model and the numerics classes that serve it: those without gaps first, then those with most nodes."""

    name: str
    digest: str
    blocks: int
    classes: tuple[ClassView, ...]

    @property
    def gaps(self) -> tuple[Span, ...]:
        """Blocks that the best class lacks.  A session runs within one class."""
        return self.classes[0].gaps if self.classes else (Span(0, self.blocks),)

    @property
    def why_missing(self) -> str:
        """What the nodes that had the missing blocks do, or empty if none is known, or if no blocks are missing."""
        nodes = [node for served in self.classes for node in served.nodes if not node.serves]
        held = [node for node in nodes if any(map(node.span.overlaps, self.gaps))]
        return list_some([f"{node.address} {node.doing}" for node in held])

    @property
    def covered(self) -> bool:
        """Whether one class serves every block."""
        return not self.gaps

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "name": self.name,
            "model": self.digest,
            "blocks": self.blocks,
            "covered": self.covered,
            "gaps": [str(gap) for gap in self.gaps],
            "why_missing": self.why_missing,
            "classes": [served.as_dict() for served in self.classes],
        }


@dataclass(frozen=True)
class Overview:
    """All models of a swarm."""

    models: tuple[ModelView, ...]
    refused: Mapping[str, int] = field(default_factory=dict)
    """Number of records that are not shown, by reason."""
    silent: Mapping[str, str] = field(default_factory=dict)
    """Why an address that was asked for records gave none, by address."""

    @property
    def covered(self) -> bool:
        """Whether there are models, and every block of each is served."""
        return bool(self.models) and all(model.covered for model in self.models)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "covered": self.covered,
            "models": [model.as_dict() for model in self.models],
            "refused": dict(self.refused),
            "silent": dict(self.silent),
        }


def make_overview(
    records: Iterable[NodeRecord],
    probes: Mapping[str, Probe],
    *,
    model_filter: ModelFilter | None = None,
    refused: Mapping[str, int] | None = None,
    silent: Mapping[str, str] | None = None,
) -> Overview:
    """Sort records into models and numerics classes, and attach `probes` (by node id).

    With `model_filter` that model alone is shown, even if no node serves it.  `refused` counts records that were
    refused before, by reason; `silent` holds addresses that gave no records, with the reason.
    """
    counted = Counter({reason: count for reason, count in (refused or {}).items() if reason not in NORMAL})
    kept: list[NodeRecord] = []
    for record in records:
        if reason := _reason_to_hide(record, model_filter):
            counted[reason] += 1
        else:
            kept.append(record)
    # By the number of blocks too: a record that gives a known model another number must not count as serving all of it.
    kept.sort(key=_model_of)
    models = [_model(list(group), probes, model_filter) for _, group in groupby(kept, _model_of)]
    if model_filter is not None and not models:
        models = [ModelView(model_filter.name, model_filter.digest, model_filter.blocks, ())]
    models.sort(key=lambda model: (model.name, model.digest, model.blocks))
    reasons = {clean(address): clean(reason) for address, reason in sorted((silent or {}).items())}
    return Overview(tuple(models), dict(sorted(counted.items())), reasons)


def clean(text: str) -> str:
    """Return text of other owners without characters that control a terminal, cut to 200 characters."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:LONGEST_TEXT])
    return shown if len(text) <= LONGEST_TEXT else shown + "…"


def _reason_to_hide(record: NodeRecord, model_filter: ModelFilter | None) -> str:
    """Return why a record is not shown, or an empty text."""
    if model_filter is None:
        return ""
    if record.model != model_filter.digest:
        return "other-model"
    return "" if record.blocks == model_filter.blocks else "other-block-count"


def _model_of(record: NodeRecord) -> tuple[str, int]:
    return record.model, record.blocks


def _model(records: list[NodeRecord], probes: Mapping[str, Probe], model_filter: ModelFilter | None) -> ModelView:
    names = Counter(record.name for record in records)
    classes: dict[NumericsClass, list[NodeView]] = {}
    nodes_per_class = Counter(record.numerics for record in records if record.numerics.weights != UNKNOWN_WEIGHTS)
    for record in records:
        numerics = _likely_class(record.numerics, nodes_per_class)
        classes.setdefault(numerics, []).append(_node(record, probes.get(record.node)))
    views = [
        ClassView(numerics, records[0].blocks, tuple(sorted(nodes, key=lambda node: (node.span, node.id))))
        for numerics, nodes in classes.items()
    ]
    views.sort(key=lambda view: (bool(view.gaps), -len(view.nodes), view.numerics.weights, view.numerics.dtype))
    # Names are for people, and a node may announce a wrong one.  Most nodes have the right one; the user's is right.
    name = model_filter.name if model_filter is not None else max(sorted(names), key=lambda name: names[name])
    return ModelView(clean(name), records[0].model, records[0].blocks, tuple(views))


def _likely_class(numerics: NumericsClass, nodes_per_class: Mapping[NumericsClass, int]) -> NumericsClass:
    """Return the class of a node, for one that has not read its weights yet the likely class.

    That is the class with most nodes among those that differ in the weights alone.
    """
    if numerics.weights != UNKNOWN_WEIGHTS:
        return numerics
    similar = [other for other in nodes_per_class if replace(other, weights=UNKNOWN_WEIGHTS) == numerics]
    return max(similar, key=lambda other: (nodes_per_class[other], other.weights), default=numerics)


def _node(record: NodeRecord, probe: Probe | None) -> NodeView:
    return NodeView(
        id=record.node,
        address=clean(record.address),
        span=record.span,
        state=record.state,
        reachable=record.reachable,
        rate=record.rate,
        hop_s=record.hop_s,
        free_tokens=record.free_tokens,
        total_tokens=record.total_tokens,
        software=clean(record.software),
        driver=record.driver,
        speculator=clean(record.speculator),
        agreement=record.agreement,
        probe=None if probe is None else Probe(probe.latency_s, clean(probe.reason)),
    )
