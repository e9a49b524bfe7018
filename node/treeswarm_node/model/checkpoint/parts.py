"""Divide the tensors of a span into parts that are loaded one after another.  Pure, but for reading modules' shapes.

A part is read, converted and quantized before the next one is read, so that what has not been quantized is never more
than a part: the tensors of some modules, or some experts of one fused parameter.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from treeswarm_node.model.checkpoint.tensors import HostedTensors
from treeswarm_node.model.families.blocks import find_blocks

# Bytes of a part's tensors in the model's dtype, unless one tensor or one expert's matrix is larger.  Merging experts
# takes three times as much, and every part takes some 10 ms beyond its reading.
PART_BYTES = 64 << 20
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class ExpertRange:
    """Names some experts of a fused parameter [experts, …]."""

    parameter: str
    """Name of the parameter in the model."""
    start: int
    """First expert."""
    end: int
    """Expert after the last one."""
    in_one_tensor: bool
    """Whether the checkpoint has all experts in one tensor, of which these are cut out."""


@dataclass(frozen=True)
class LoadPart:
    """Names tensors that are loaded together."""

    block: int | None
    """Index of their block, or None if they belong to none."""
    tensors: tuple[str, ...]
    """Names in the checkpoint."""
    size: int
    """Number of bytes of what the tensors become, before it is quantized."""
    experts: ExpertRange | None = None
    """Experts to which they belong, or None if they are loaded whole."""


@dataclass(frozen=True)
class LoadedPart:
    """Says what a part has become."""

    part: LoadPart
    names: frozenset[str]
    """Names in the model of the tensors that were loaded; a fused parameter is named in each of its parts."""


@dataclass
class _Growing:
    """Collects the tensors of the next part of a block."""

    names: list[str] = field(default_factory=list)
    size: int = 0


def divide(
    tensors: HostedTensors, skeleton: PreTrainedModel, blocks: Iterable[int]
) -> dict[int | None, list[LoadPart]]:
    """Return the parts of each block in order, and last, under None, those of what belongs to no block.

    A module's tensors are in one part, unless they are its fused experts.
    """
    by_block: dict[int | None, list[str]] = {block: [] for block in (*blocks, None)}
    decoder = find_blocks(skeleton)
    for name, target in tensors.targets.items():
        by_block[decoder.block_of(target)].append(name)
    sizes = {name: tensor.nbytes for name, tensor in skeleton.state_dict().items()}
    experts = fused_experts(skeleton)
    return {block: list(_divide_block(block, names, tensors, sizes, experts)) for block, names in by_block.items()}


def fused_experts(model: torch.nn.Module) -> dict[str, int]:
    """Return the number of experts of each parameter [experts, …] that transformers can compute expert by expert."""
    return {
        f"{path}.{name}": len(parameter)
        for path, module in model.named_modules()
        if hasattr(module, "is_transposed")
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def join(loaded: Sequence[LoadedPart], limit: int) -> list[LoadedPart]:
    """Return the parts of one block with neighbours joined, to at most `limit` bytes where they can be joined."""
    joined: list[LoadedPart] = []
    for part in loaded:
        both = _join_two(joined[-1], part) if joined else None
        if both is not None and both.part.size <= limit:
            joined[-1] = both
        else:
            joined.append(part)
    return joined


def _join_two(first: LoadedPart, second: LoadedPart) -> LoadedPart | None:
    """Return a part of two, or None if they are not tensors of some modules, or experts of one parameter."""
    before, after = first.part.experts, second.part.experts
    if (before and before.parameter) != (after and after.parameter):
        return None
    experts = replace(before, end=after.end) if before and after else None
    tensors = dict.fromkeys((*first.part.tensors, *second.part.tensors))
    size = first.part.size + second.part.size
    part = LoadPart(first.part.block, tuple(tensors), size, experts)
    return LoadedPart(part, first.names | second.names)


def _divide_block(
    block: int | None,
    names: Sequence[str],
    tensors: HostedTensors,
    sizes: Mapping[str, int],
    experts: Mapping[str, int],
) -> Iterator[LoadPart]:
    by_target: dict[str, list[str]] = {}
    for name in names:
        by_target.setdefault(tensors.targets[name], []).append(name)
    by_module: dict[str, list[str]] = {}
    for target, parts in by_target.items():
        ranges, size = None, sizes[target] // experts.get(target, 1)
        if target in experts and sizes[target] > PART_BYTES:
            ranges = _ranges(target, parts, experts[target], size, tensors.shapes)
        if ranges is None:
            by_module.setdefault(target if target in experts else target.rpartition(".")[0], []).extend(parts)
        else:
            yield from (LoadPart(block, names, size * (part.end - part.start), part) for names, part in ranges)
    growing = _Growing()
    for module_names in by_module.values():
        size = sum(sizes.get(target, 0) for target in {tensors.targets[name] for name in module_names})
        if growing.names and growing.size + size > PART_BYTES:
            yield LoadPart(block, tuple(growing.names), growing.size)
            growing = _Growing()
        growing.names += module_names
        growing.size += size
    if growing.names:
        yield LoadPart(block, tuple(growing.names), growing.size)


def _ranges(
    target: str, names: Sequence[str], count: int, size: int, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[tuple[str, ...], ExpertRange]] | None:
    """Return the tensors of a few experts at a time, or None if the checkpoint's tensors cannot be divided so."""
    at_once = max(1, PART_BYTES // size)
    limits = [(start, min(start + at_once, count)) for start in range(0, count, at_once)]
    if len(names) == 1 and shapes.get(names[0], ())[:1] == (count,) and len(shapes[names[0]]) >= 3:
        return [((names[0],), ExpertRange(target, start, end, in_one_tensor=True)) for start, end in limits]
    by_expert: list[list[str]] = [[] for _ in range(count)]
    for name in names:
        found = EXPERT.search(name)
        if found is None or int(found[1]) >= count:
            return None
        by_expert[int(found[1])].append(name)
    if len({len(each) for each in by_expert}) != 1:
        return None
    return [
        (tuple(itertools.chain.from_iterable(by_expert[start:end])), ExpertRange(target, start, end, False))
        for start, end in limits
    ]
