"""Fill in what the settings leave to `auto`: the device, and the numbers that a swarm computes in."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from treeswarm.extras import missing_modules
from treeswarm.programs.devices import (
    Machine,
    NumericsRequest,
    choose_device,
    choose_numerics,
    describe_machine,
)
from treeswarm.protocol.messages import NumericsClass
from treeswarm_node.config import NodeConfig

log = logging.getLogger(__name__)


def this_machine() -> Machine:
    """Return what this machine has to compute with."""
    return describe_machine(torch, bitsandbytes=not missing_modules("quantization"))


def with_device(config: NodeConfig, machine: Machine) -> NodeConfig:
    """Return the config with a device."""
    choice = choose_device(config.device.name, machine)
    return replace(
        config, device=replace(config.device, name=choice.name), automatic=replace(config.automatic, device=choice.why)
    )


def with_numerics(
    config: NodeConfig, machine: Machine, checkpoint: str, swarm: Sequence[NumericsClass] = ()
) -> NodeConfig:
    """Return a config that has a device with a dtype, a quantization and a format of activations.

    `checkpoint` is the dtype in which the model was published, `swarm` the numerics class of each other node that
    serves it.  A node that would compute differently from them logs a warning.
    """
    model = config.model
    request = NumericsRequest(model.dtype, model.quantization, model.activations)
    choice = choose_numerics(request, config.device.name, machine, checkpoint, swarm)
    if choice.warning:
        log.warning("%s", choice.warning)
    model = replace(model, dtype=choice.dtype, quantization=choice.quantization, activations=choice.activations)
    return replace(config, model=model, automatic=replace(config.automatic, numerics=choice.why))
