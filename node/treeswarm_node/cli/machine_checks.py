"""Check the machine that a node would run on."""

import errno
import socket
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from treeswarm.errors import SwarmError
from treeswarm.extras import install_command
from treeswarm.model_files import HUB_ID
from treeswarm.programs.devices import Machine, choose_device, choose_dtype
from treeswarm.programs.health import Finding, Verdict, check_free_space
from treeswarm.programs.units import format_bytes
from treeswarm.protocol.address import Address
from treeswarm_node.attention.flash import FlashAttention
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo, find_device
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.membership.identity_file import claim_identity
from treeswarm_node.model.attention_selection import check_attention_choice, find_adapter_fault
from treeswarm_node.model.check.device_check import NumericsCheck, check_numerics
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.memory_fit import free_memory
from treeswarm_node.span_choice import read_hosting_limits

# A block of an 8B model in 16 bits takes 0.4 GiB, its embedding and LM head together 2.4: a node with less memory than
# this is of use to small models only.
LITTLE_MEMORY = 4 << 30
# One shard of a large model's weights has 5 GB.
LITTLE_DISK = 20e9
NO_DISK = 1e9
# Sockets and files of the program itself, with its registry.
OWN_FILES = 256


def check_software() -> Finding:
    """Check the versions of torch and transformers."""
    message = f"torch {torch.__version__}, transformers {version('transformers')}"
    if int(version("transformers").split(".")[0]) < 5:
        return Finding.fail("software", f"{message}: transformers 5 or newer is needed", install_command("node"))
    return Finding.ok("software", message)


def check_device(config: NodeConfig, machine: Machine) -> tuple[Finding, torch.device | None]:
    """Check the device asked for or chosen, and return it too; None if it cannot be used."""
    try:
        device = find_device(config.device.name)
    except SwarmError as error:
        return Finding.of_error("device", error), None
    has_bf16 = choose_dtype("auto", device.type, machine, "bfloat16")[0] == "bfloat16"
    computes = "computes in bfloat16" if has_bf16 else "bfloat16 is only emulated"
    if config.automatic.device:
        computes += f" (auto: {config.automatic.device})"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kind = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        return Finding.ok("device", f"{device}: {kind}, {format_bytes(properties.total_memory)}, {computes}"), device
    threads = f"{torch.get_num_threads()} threads, " if device.type == "cpu" else ""
    message = f"{device}: {threads}{computes}"
    better = choose_device("auto", machine).name
    if device.type == "cpu" and better != "cpu":
        next_step = f"leave out --device, or give --device {better}"
        return Finding.warn("device", f"{message}; this machine has a faster device", next_step), device
    return Finding.ok("device", message), device


def report_dtype(config: NodeConfig) -> Finding:
    """Report the dtype of weights and activations in a new swarm, and why."""
    why = f" (auto: {config.automatic.numerics}; in a swarm that is joined, as its nodes compute)"
    return Finding.ok("dtype", f"{config.model.dtype}{why if config.automatic.numerics else ''}")


def check_memory(config: NodeConfig, device: torch.device, model: ModelInfo | None) -> Finding:
    """Check the free memory, and how many of the model's blocks it holds if the weights are here to be measured."""
    free = config.device.memory or free_memory(device)
    message = f"{format_bytes(free)} {'to use' if config.device.memory else 'free'} on {device.type}"
    if model is not None:
        try:
            skeleton = build_skeleton(model.folder, getattr(torch, config.model.dtype))
            counting = replace(config, model=replace(config.model, num_blocks=None))
            limits = read_hosting_limits(counting, model, skeleton).spans
        except SwarmError as error:
            return Finding.of_error("memory", error)
        blocks = model.shape.blocks
        fit = blocks if limits.whole else limits.longest
        return Finding.ok("memory", f"{message}: {fit} of the {blocks} blocks of {model.name} fit")
    if free < LITTLE_MEMORY:
        next_step = (
            "close other programs that use it; or serve with less: --num-blocks 1, --quantization nf4, "
            "fewer --kv-tokens"
        )
        return Finding.warn("memory", message, next_step)
    return Finding.ok("memory", message)


def check_disk(model: str) -> Finding:
    """Check the free space where the hub's client keeps weights."""
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415  # reads the user's settings when imported

    next_step = "free some space, or keep weights elsewhere: set HF_HOME=/path/with/space in this program's environment"
    needed = NO_DISK if HUB_ID.fullmatch(model) else 0.0
    return check_free_space(Path(HF_HUB_CACHE), needed=needed, enough=LITTLE_DISK, next_step=next_step)


def files_needed(config: NodeConfig) -> int:
    """Return the number of files and sockets of a busy node.

    A session needs the connections of two streams, a lent connection needs two sockets.
    """
    return OWN_FILES + 2 * config.limits.sessions + 2 * config.lending.ports * config.lending.connections


def check_port(listen: str) -> Finding:
    """Check whether the port can be listened on now."""
    try:
        address = Address.parse(listen)
    except SwarmError as error:
        return Finding.of_error("port", error)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: a port in TIME_WAIT is free
            probe.bind((address.host, address.port))
            probe.listen()
    except OSError as error:
        next_step = "give another --listen HOST:PORT"
        if error.errno == errno.EADDRINUSE:
            next_step = f"end the program that uses it (is the node running already?), or {next_step}"
        elif error.errno == errno.EACCES:
            next_step += " with a port above 1023"
        return Finding.fail("port", f"cannot listen on {address.bare}: {error.strerror or error}", next_step)
    message = f"{address.bare} is free" if address.port else f"any free port on {address.host}"
    return Finding.ok("port", message)


def check_metrics_port(listen: str | None) -> list[Finding]:
    """Check whether the metrics can be served where the owner wants them; return nothing if they are not served."""
    if not listen:
        return []
    finding = check_port(listen)
    return [finding if finding.verdict is Verdict.OK else replace(finding, check="metrics port")]


def check_identity(config: NodeConfig) -> Finding:
    """Check that the node's identity can be read and that no running node holds it.  It is held for a moment."""
    path = config.network.identity
    if path is None or not path.exists():
        return Finding.ok("identity", "kept from run to run" if path is None else f"made at the first start in {path}")
    try:
        with claim_identity(path, config.model.name, 0) as (identity, _):
            return Finding.ok("identity", f"node {identity.node_id}")
    except SwarmError as error:
        return Finding.of_error("identity", error)


def check_device_numerics(config: NodeConfig, device: torch.device) -> Finding:
    """Check which numerics the device computes correctly, and whether those asked for are among them."""
    return judge_numerics(check_numerics(device), config.model.dtype, config.model.quantization)


def check_attention_kernels(config: NodeConfig, device: torch.device) -> Finding:
    """Check what would compute attention, and whether flash kernels agree with torch on heads like an 8B model's."""
    dtype = getattr(torch, config.model.dtype)
    try:
        flash = check_attention_choice(config.device.attention, device, dtype)
    except SwarmError as error:
        return Finding.of_error("attention", error)
    if not flash:
        return Finding.ok("attention", "plain torch")
    adapter = FlashAttention(device)
    failure = find_adapter_fault(adapter, 32, KVShape(8, 128, 128), dtype, device)
    if failure is None:
        return Finding.ok("attention", f"{adapter.name} agrees with plain torch")
    next_step = "leave out --attention, and the node uses plain torch; or update the driver and torch"
    return Finding.warn("attention", f"{adapter.name} cannot be used here: {failure}", next_step)


def judge_numerics(checks: list[NumericsCheck], dtype: str, quantization: str) -> Finding:
    """Return the finding that the checks amount to for a node with this dtype and quantization.  Pure."""
    passing = [check for check in checks if check.passes]
    failing = [check for check in checks if not check.passes]
    message = f"computed correctly: {', '.join(check.name for check in passing) or 'nothing'}"
    needed = [
        check
        for check in failing
        if (check.quantization == quantization != "none") or (check.dtype == dtype and check.quantization == "none")
    ]
    if failing:
        failures = (f"{check.name} ({check.reason or f'off by {check.error:.2g}'})" for check in failing)
        message += f"; {'unusable here' if needed else 'this node does not need'}: {', '.join(failures)}"
    if not needed:
        return Finding.ok("numerics", message)
    dtypes = [check.name for check in passing if check.quantization == "none"]
    if any(check.quantization != "none" for check in needed):
        next_step = f"{install_command('node', 'quantization')}, or leave out --quantization"
    elif dtypes:
        next_step = f"serve in another format: --dtype {dtypes[0]}"
    else:
        next_step = "try another --device, or update its driver and torch"
    return Finding.fail("numerics", message, next_step)
