"""Find what a node would be refused for at once: before torch is imported and before anything is connected."""

from collections.abc import Callable, Iterator
from functools import partial

from treeswarm.errors import BadRequest, SwarmError
from treeswarm.extras import require
from treeswarm.keys import Identity, read_swarm_key
from treeswarm.model_files import check_model_name, is_at_hand, read_config, read_shape, resolve_model
from treeswarm.protocol.address import Address
from treeswarm.protocol.spans import Span
from treeswarm.registry import check_node_spec
from treeswarm.transport.emulated import LinkShape
from treeswarm_node.cli.qr_code import check_qr
from treeswarm_node.config import ModelConfig, NodeConfig, NodeLimits
from treeswarm_node.joining import check_code
from treeswarm_node.model.checkpoint.formats import check_format

QUANTIZED = ("nf4",)
"""Quantizations that need a library; `auto` does without it."""


def check_config(config: NodeConfig) -> None:
    """Check settings against each other, against small files and against nothing else.

    Raises BadRequest, ModelError.
    """
    for refusal in find_refusals(config):
        raise refusal


def find_refusals(config: NodeConfig) -> Iterator[SwarmError]:
    """Yield an error for every setting that a node is refused for at once; `swarm-node doctor` shows all of them."""
    network, operations, limits = config.network, config.operations, config.limits
    checks: list[Callable[[], object]] = [partial(_check_model, config.model)] if config.model.name else []
    checks += [partial(Address.parse, text) for text in (network.listen, network.announce, operations.metrics) if text]
    if network.registry:
        checks.append(partial(check_node_spec, network.registry))
    if network.swarm_key:
        checks.append(partial(read_swarm_key, network.swarm_key))
    if network.identity and network.identity.exists():
        checks.append(partial(Identity.load_or_create, network.identity))
    if network.emulate_link:
        checks.append(partial(LinkShape.parse, network.emulate_link))
    if operations.qr:
        checks.append(check_qr)
    if config.driving.offered and (draft := config.driving.draft_model):
        checks.append(partial(check_model_name, draft))
    checks += [partial(check_code, network), partial(_check_limits, limits)]
    said: set[str] = set()
    for check in checks:
        try:
            check()
        except SwarmError as error:
            if str(error) not in said:  # the key file of a swarm is read by more than one check
                said.add(str(error))
                yield error


def _check_limits(limits: NodeLimits) -> None:
    if limits.sessions < 1:
        raise BadRequest(f"--max-sessions is {limits.sessions}: give at least 1")
    if not limits.drain_grace_s >= 0.0:
        raise BadRequest(f"--grace is {limits.drain_grace_s:g}: give the seconds to wait, 0 or more")


def check_extras(program: str, quantization: str = "none") -> None:
    """Raise BadRequest that says what to install, if packages are missing that the program needs."""
    require("node", program)
    if quantization in QUANTIZED:
        require("quantization", f"--quantization {quantization}")


def _check_model(model: ModelConfig) -> None:
    check_model_name(model.name)
    if not is_at_hand(model.name):
        return  # its config may have to be downloaded
    folder = resolve_model(model.name)
    check_format(folder, read_config(folder))
    shape = read_shape(folder)
    if model.span is not None and model.span.end > shape.blocks:
        raise BadRequest(
            f"blocks {model.span} exceed the model, which has {shape.blocks}: "
            f"give --blocks within {Span(0, shape.blocks)}"
        )
