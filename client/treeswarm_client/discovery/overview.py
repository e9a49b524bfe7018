"""A swarm as one client sees it, in figures: models, blocks, gaps, nodes.  Pure: records and measurements in."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import UNKNOWN_WEIGHTS, NodeRecord, NodeState
from treeswarm.protocol.spans import Span, missing_blocks

# What strangers call things ends up on a terminal; nothing honest is longer.
LONGEST_TEXT = 200


@dataclass(frozen=True)
class Probe:
    """How a node answered this client's ping."""

    latency_s: float | None
    """Round trip on an open stream; None: it did not answer."""
    reason: str = ""
    """It did not answer."""


@dataclass(frozen=True)
class ModelFilter:
    """The one model to show, by the name its user gives it and by what its config says."""

    name: str
    digest: str
    blocks: int


@dataclass(frozen=True)
class NodeView:
    """One node.  Rates, times and room are its own words; `probe` is what this client measured."""

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
    probe: Probe | None = None
    """None: not asked yet."""

    @property
    def silent(self) -> bool:
        """It was asked, and did not answer."""
        return self.probe is not None and self.probe.latency_s is None

    @property
    def serves(self) -> bool:
        """This client could open a session on it, if it has room.  A record outlives its node by minutes, so one that
        does not answer serves nobody here."""
        return self.state is NodeState.ONLINE and not self.silent

    @property
    def load(self) -> float | None:
        """Share of its room that sessions have reserved; None where it tells of no room."""
        return min(1.0, max(0.0, 1 - self.free_tokens / self.total_tokens)) if self.total_tokens > 0 else None

    @property
    def latency_ms(self) -> float | None:
        return None if self.probe is None or self.probe.latency_s is None else self.probe.latency_s * 1e3

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
        }


@dataclass(frozen=True)
class ClassView:
    """Nodes that compute the same text, in the order of their spans."""

    numerics: NumericsClass
    blocks: int
    nodes: tuple[NodeView, ...]

    @cached_property
    def replicas(self) -> tuple[int, ...]:
        """How many nodes serve each block."""
        steps = [0] * (self.blocks + 1)
        for node in self.nodes:
            if node.serves:
                steps[node.span.start] += 1
                steps[node.span.end] -= 1
        return tuple(accumulate(steps))[: self.blocks]

    @cached_property
    def gaps(self) -> tuple[Span, ...]:
        """Blocks that nobody serves."""
        return tuple(missing_blocks([node.span for node in self.nodes if node.serves], self.blocks))

    @property
    def weakest(self) -> int:
        """Replicas of the block that has fewest."""
        return min(self.replicas)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    """A model, and the classes it is served in: those that are whole first, then those of most nodes."""

    name: str
    digest: str
    blocks: int
    classes: tuple[ClassView, ...]

    @property
    def gaps(self) -> tuple[Span, ...]:
        """What the best of the classes lacks: a session runs within one."""
        return self.classes[0].gaps if self.classes else (Span(0, self.blocks),)

    @property
    def covered(self) -> bool:
        return not self.gaps

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "model": self.digest,
            "blocks": self.blocks,
            "covered": self.covered,
            "gaps": [str(gap) for gap in self.gaps],
            "classes": [one.as_dict() for one in self.classes],
        }


@dataclass(frozen=True)
class Overview:
    """All of it."""

    models: tuple[ModelView, ...]
    refused: Mapping[str, int] = field(default_factory=dict)
    """Records that are not shown, by reason."""
    silent: Mapping[str, str] = field(default_factory=dict)
    """Addresses that were asked for records and told none, and why."""

    @property
    def covered(self) -> bool:
        """Somebody serves every block of every model shown, and there is one."""
        return bool(self.models) and all(model.covered for model in self.models)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    wanted: ModelFilter | None = None,
    refused: Mapping[str, int] | None = None,
    silent: Mapping[str, str] | None = None,
) -> Overview:
    """Sort it all.  With `wanted` that model alone is shown, also when nobody serves it."""
    counted = Counter(refused or {})
    kept: list[NodeRecord] = []
    for record in records:
        if doubt := _doubt(record, wanted):
            counted[doubt] += 1
        else:
            kept.append(record)
    # By the number of blocks too: a record that gives a known model another number must not pass for the whole of it.
    kept.sort(key=_model_of)
    models = [_model(list(group), probes, wanted) for _, group in groupby(kept, _model_of)]
    if wanted is not None and not models:
        models = [ModelView(wanted.name, wanted.digest, wanted.blocks, ())]
    models.sort(key=lambda model: (model.name, model.digest, model.blocks))
    said = {clean(address): clean(why) for address, why in sorted((silent or {}).items())}
    return Overview(tuple(models), dict(sorted(counted.items())), said)


def clean(text: str) -> str:
    """Strangers' words without what moves a terminal's cursor or turns its writing around, and not too many."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:LONGEST_TEXT])
    return shown if len(text) <= LONGEST_TEXT else shown + "…"


def _doubt(record: NodeRecord, wanted: ModelFilter | None) -> str:
    """Why a record is not shown, or nothing."""
    if wanted is None:
        return ""
    if record.model != wanted.digest:
        return "other-model"
    return "" if record.blocks == wanted.blocks else "other-block-count"


def _model_of(record: NodeRecord) -> tuple[str, int]:
    return record.model, record.blocks


def _model(records: list[NodeRecord], probes: Mapping[str, Probe], wanted: ModelFilter | None) -> ModelView:
    """Of records of one model."""
    names = Counter(record.name for record in records)
    classes: dict[NumericsClass, list[NodeView]] = {}
    known = Counter(record.numerics for record in records if record.numerics.weights != UNKNOWN_WEIGHTS)
    for record in records:
        numerics = _likely_class(record.numerics, known)
        classes.setdefault(numerics, []).append(_node(record, probes.get(record.node)))
    made = [
        ClassView(numerics, records[0].blocks, tuple(sorted(nodes, key=lambda node: (node.span, node.id))))
        for numerics, nodes in classes.items()
    ]
    made.sort(key=lambda one: (bool(one.gaps), -len(one.nodes), one.numerics.weights, one.numerics.dtype))
    # Names are for people, and anybody may lie about them; most nodes have it right, the user always has.
    name = wanted.name if wanted is not None else max(sorted(names), key=lambda name: names[name])
    return ModelView(clean(name), records[0].model, records[0].blocks, tuple(made))


def _likely_class(numerics: NumericsClass, known: Mapping[NumericsClass, int]) -> NumericsClass:
    """Where a node that has not read its weights yet will belong, if it loads what most others of its kind serve."""
    if numerics.weights != UNKNOWN_WEIGHTS:
        return numerics
    alike = [one for one in known if replace(one, weights=UNKNOWN_WEIGHTS) == numerics]
    return max(alike, key=lambda one: (known[one], one.weights), default=numerics)


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
        probe=None if probe is None else Probe(probe.latency_s, clean(probe.reason)),
    )
