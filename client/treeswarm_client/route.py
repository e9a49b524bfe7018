"""Which nodes make the model: descriptions in, a route out.  Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from treeswarm.errors import Mismatch, RouteError
from treeswarm.messages import Description, NumericsClass
from treeswarm.spans import Span, shortest_chain


@dataclass(frozen=True)
class Hop:
    """One node of a route and the blocks it computes."""

    address: str
    span: Span


@dataclass(frozen=True)
class Route:
    """Nodes in the order of their blocks, all of one numerics class."""

    hops: tuple[Hop, ...]
    numerics: NumericsClass
    blocks: int
    vocab_size: int
    hidden_size: int
    max_positions: int

    @property
    def row_bytes(self) -> int:
        """Of one row of activations between nodes."""
        return self.hidden_size * (4 if self.numerics.dtype == "float32" else 2)


def plan_route(nodes: Mapping[str, Description], config: str) -> Route:
    """The shortest chain over `nodes` (by address) for the model with config digest `config`.

    Raises RouteError without nodes, Mismatch where a node serves another model or the nodes differ in weights or
    numerics, MissingBlocks where they do not cover the model.
    """
    if not nodes:
        raise RouteError("no node answered: check the addresses in --peers and that `swarm-node` runs there")
    first_address, first = next(iter(nodes.items()))
    for address, node in nodes.items():
        if node.config != config:
            raise Mismatch(
                f"{address} serves a model of another config ({node.blocks} blocks, digest {node.config[:12]}) than "
                f"--model says ({config[:12]}): name the model that the node serves"
            )
        if node.numerics != first.numerics:
            raise Mismatch(
                f"{first_address} and {address} would compute different text: "
                f"{_difference(first.numerics, node.numerics)}; start both from the same model "
                "directory with the same --dtype"
            )
    addresses = list(nodes)
    chain = shortest_chain([nodes[address].span for address in addresses], first.blocks)
    return Route(
        hops=tuple(Hop(addresses[index], span) for index, span in chain),
        numerics=first.numerics,
        blocks=first.blocks,
        vocab_size=first.vocab_size,
        hidden_size=first.hidden_size,
        max_positions=min(node.max_positions for node in nodes.values()),
    )


def _difference(one: NumericsClass, other: NumericsClass) -> str:
    if one.weights != other.weights:
        return f"their weights differ ({one.weights[:12]} and {other.weights[:12]})"
    if one.dtype != other.dtype:
        return f"they compute in {one.dtype} and {other.dtype}"
    return f"their quantization differs ({one.quantization} and {other.quantization})"
