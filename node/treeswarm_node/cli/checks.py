"""Find what a node would be refused for at once: before torch is imported and before anything is connected."""

from treeswarm.errors import BadRequest
from treeswarm.extras import require
from treeswarm.keys import Identity, read_swarm_key
from treeswarm.model_files import check_model_name, is_path, read_shape, resolve_model
from treeswarm.protocol.address import Address
from treeswarm.protocol.spans import Span
from treeswarm.registry import check_node_spec
from treeswarm.transport.emulated import LinkShape
from treeswarm_node.cli.qr_code import check_qr
from treeswarm_node.config import ModelConfig, NetworkConfig, NodeConfig
from treeswarm_node.joining import check_code

QUANTIZED = ("int8", "nf4")
"""Quantizations that need a library; `auto` does without it."""


def check_config(config: NodeConfig) -> None:
    """Check settings against each other, against small files and against nothing else.

    Raises BadRequest, ModelError.
    """
    _check_model(config.model)
    _check_network(config.network)
    check_code(config.network)
    if config.operations.qr:
        check_qr()
    if config.operations.metrics:
        Address.parse(config.operations.metrics)
    if config.limits.sessions < 1:
        raise BadRequest(f"--max-sessions is {config.limits.sessions}: give at least 1")
    if not config.limits.drain_grace_s >= 0.0:
        raise BadRequest(f"--grace is {config.limits.drain_grace_s:g}: give the seconds to wait, 0 or more")


def check_extras(program: str, quantization: str = "none") -> None:
    """Raise BadRequest that says what to install, if packages are missing that the program needs."""
    require("node", program)
    if quantization in QUANTIZED:
        require("quantization", f"--quantization {quantization}")


def _check_model(model: ModelConfig) -> None:
    check_model_name(model.name)
    if not is_path(model.name) and "/" in model.name:
        return  # the config of a hub id may have to be downloaded
    shape = read_shape(resolve_model(model.name))
    if model.span is not None and model.span.end > shape.blocks:
        raise BadRequest(
            f"blocks {model.span} exceed the model, which has {shape.blocks}: "
            f"give --blocks within {Span(0, shape.blocks)}"
        )


def _check_network(network: NetworkConfig) -> None:
    Address.parse(network.listen)
    if network.announce:
        Address.parse(network.announce)
    if network.registry:
        check_node_spec(network.registry)
    if network.swarm_key:
        read_swarm_key(network.swarm_key)
    if network.identity and network.identity.exists():
        Identity.load_or_create(network.identity)
    if network.emulate_link:
        LinkShape.parse(network.emulate_link)
