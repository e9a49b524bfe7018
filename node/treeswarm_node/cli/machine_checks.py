"""Findings about the machine that a node would run on."""

import errno
import shutil
import socket
from importlib.metadata import version
from pathlib import Path

import torch

from treeswarm.errors import SwarmError
from treeswarm.model_files import HUB_ID
from treeswarm.programs.health import Finding
from treeswarm.protocol.address import Address
from treeswarm_node.attention.flash import FlashAttention
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo, choose_dtype, find_device
from treeswarm_node.kv_cache.kv_store import KVShape
from treeswarm_node.model.attention_selection import check_attention_choice, find_adapter_fault
from treeswarm_node.model.device_check import NumericsCheck, check_numerics
from treeswarm_node.model.memory_fit import count_blocks_that_fit, free_memory, offload_room, read_footprint

GIB = 2**30
# A block of an 8B model in 16 bits takes 0.4 GiB, its ends 2.4: with less a node is of use to small models alone.
LITTLE_MEMORY = 4 * GIB
# One shard of a large model's weights has 5 GB.
LITTLE_DISK = 20e9
NO_DISK = 1e9
# Sockets and files of the program itself, with its registry.
OWN_FILES = 256


def software() -> Finding:
    """torch and transformers."""
    said = f"torch {torch.__version__}, transformers {version('transformers')}"
    if int(version("transformers").split(".")[0]) < 5:
        return Finding.fail("software", said, "pip install -U 'treeswarm[node]': transformers 5 or newer is needed")
    return Finding.ok("software", said)


def device_findings(config: NodeConfig) -> tuple[list[Finding], torch.device | None]:
    """The device asked for, and what it is; None where it cannot be used."""
    try:
        device = find_device(config.device.name)
    except SwarmError as error:
        return [Finding.of_error("device", error)], None
    dtype = choose_dtype("auto", device)
    computes = f"computes in {dtype}" if dtype == "bfloat16" else "bfloat16 only emulated"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kind = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        return [Finding.ok("device", f"{device}: {kind}, {properties.total_memory / GIB:.0f} GiB, {computes}")], device
    said = f"{device}: {torch.get_num_threads()} threads, {computes}" if device.type == "cpu" else str(device)
    better = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if device.type == "cpu" and better:
        return [Finding.warn("device", f"{said}; there is a faster one", f"give --device {better}")], device
    return [Finding.ok("device", said)], device


def room(config: NodeConfig, device: torch.device, model: ModelInfo | None) -> Finding:
    """Free memory, and how many of the model's blocks it holds, where the weights are here to be measured."""
    free = config.device.memory or free_memory(device)
    said = f"{free / GIB:.1f} GiB {'to use' if config.device.memory else 'free'} on {device.type}"
    if model is not None:
        try:
            dtype = getattr(torch, choose_dtype(config.model.dtype, device))
            footprint = read_footprint(model.folder, dtype, config.model.quantization)
        except SwarmError:
            said += f"; how many blocks of {model.name} fit is known once its weights are here"
        else:
            try:
                fit = count_blocks_that_fit(
                    free, footprint, kv_tokens=config.device.kv_tokens, forward_rows=config.limits.budget.rows,
                    store=offload_room(config.device.offload), blocks=model.shape.blocks,
                )  # fmt: skip
            except SwarmError as error:
                return Finding.of_error("memory", error)
            return Finding.ok("memory", f"{said}: {fit} of the {model.shape.blocks} blocks of {model.name} fit")
    if free < LITTLE_MEMORY:
        step = "close what else uses it; or serve few blocks: --num-blocks 1, --quantization nf4, less --kv-tokens"
        return Finding.warn("memory", said, step)
    return Finding.ok("memory", said)


def disk(model: str) -> Finding:
    """Where the hub's client keeps weights."""
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415  # reads the user's settings when imported

    folder = Path(HF_HUB_CACHE)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    said = f"{free / 1e9:.0f} GB free in {folder}"
    step = "make room, or keep weights elsewhere: HF_HOME=/path/with/room, in this program's environment"
    if free < NO_DISK and HUB_ID.fullmatch(model):
        return Finding.fail("disk", said, step)
    if free < LITTLE_DISK:
        return Finding.warn("disk", f"{said}, which large models' weights fill", step)
    return Finding.ok("disk", said)


def files_needed(config: NodeConfig) -> int:
    """Files and sockets of a busy node: two streams' connections a session, two sockets a lent connection."""
    return OWN_FILES + 2 * config.limits.sessions + 2 * config.lending.ports * config.lending.connections


def free_port(listen: str) -> Finding:
    """Whether the port can be bound now."""
    try:
        address = Address.parse(listen)
    except SwarmError as error:
        return Finding.of_error("port", error)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: one in TIME_WAIT is free
            probe.bind((address.host, address.port))
            probe.listen()
    except OSError as error:
        step = "give another --listen HOST:PORT"
        if error.errno == errno.EADDRINUSE:
            step = f"end what uses it (is the node running already?), or {step}"
        elif error.errno == errno.EACCES:
            step += " with a port above 1023"
        return Finding.fail("port", f"{address.bare} cannot be listened on: {error.strerror or error}", step)
    said = f"{address.bare} is free" if address.port else f"a free one is taken on {address.host}"
    return Finding.ok("port", said)


def numerics(config: NodeConfig, device: torch.device) -> Finding:
    """Which classes this device computes right, and whether the one asked for is among them."""
    return judged(check_numerics(device), choose_dtype(config.model.dtype, device), config.model.quantization)


def attention(config: NodeConfig, device: torch.device) -> Finding:
    """What would compute it, and whether the kernels agree with plain attention, on heads as an 8B model has them."""
    dtype = getattr(torch, choose_dtype(config.model.dtype, device))
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
    step = "go without --attention: the node then computes plainly; or update the driver and torch"
    return Finding.warn("attention", f"{adapter.name} is of no use here: {failure}", step)


def judged(tried: list[NumericsCheck], dtype: str, quantization: str) -> Finding:
    """What the trials come to for a node of that class.  Pure."""
    passing = ", ".join(one.name for one in tried if one.passes)
    failing = [one for one in tried if not one.passes]
    said = f"{passing or 'nothing'} computed right"
    if failing:
        said += "; not " + ", ".join(f"{one.name} ({one.reason or f'off by {one.error:.2g}'})" for one in failing)
    wanted = [
        one
        for one in failing
        if (one.quantization == quantization != "none") or (one.dtype == dtype and one.quantization == "none")
    ]
    if wanted:
        others = [one.name for one in tried if one.passes and one.quantization == "none"]
        step = (
            f"serve in another: --dtype {others[0]}"
            if others
            else "try another --device, or update its driver and torch"
        )
        if any(one.quantization != "none" for one in wanted):
            step = "pip install 'treeswarm[node,quantization]', or go without --quantization"
        return Finding.fail("numerics", said, step)
    return Finding.ok("numerics", said)
