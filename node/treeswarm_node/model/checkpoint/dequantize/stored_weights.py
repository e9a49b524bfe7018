"""Find out which of a checkpoint's tensors form a weight that is stored in fewer bits, from names, dtypes and shapes.

The config's `quantization_config` is asked only for what the headers do not say.  So every weight is read as it is
stored, also where a checkpoint mixes formats or keeps some layers in 16 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from treeswarm.errors import UnsupportedModel
from treeswarm_node.model.checkpoint.dequantize.recognition import StoredWeight, TensorEntry, recognize

# Dtypes of weights that are stored in fewer bits, and of their scales.
INTEGERS = {"U8", "I8", "I32"}
LOW_BITS = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", *INTEGERS}
# Roles of tensors by the end of their name.  A weight `…q_proj.weight` has a scale `…q_proj.weight_scale_inv`, fused
# experts `…gate_up_proj` have `…gate_up_proj_blocks`: what is left of the name without this end names the weight.
APPENDED = {
    "_scale_inv": "scale",
    "_scale_2": "second",
    "_scale": "scale",
    "_global_scale": "divisor",
    "_packed": "packed",
    "_shape": "shape",
    "_zero_point": "zero_point",
    "_g_idx": "group_of",
    "_blocks": "blocks",
    "_scales": "scales",
    ".absmax": "absmax",
    ".quant_map": "code",
    ".nested_absmax": "nested_scale",
    ".nested_quant_map": "nested_code",
    ".quant_state.bitsandbytes__nf4": "state",
    ".quant_state.bitsandbytes__fp4": "state",
}
# Ends of names beside the module's name, as in `…q_proj.qweight`: they belong to `…q_proj.weight`.
OF_MODULE = {
    "qweight": "words",
    "qzeros": "zeros",
    "scales": "group_scale",
    "g_idx": "group_of",
    "SCB": "row_scale",
    "weight_format": "layout",
    "qscale_weight": "scale",
    "scale": "scale",
}


@dataclass(frozen=True)
class StoredWeights:
    """Describes every weight of a checkpoint that is stored in fewer bits."""

    weights: Mapping[str, StoredWeight] = field(default_factory=dict)
    """Weights by the name that they would have in 16 bits."""
    plain: frozenset[str] = frozenset()
    """Names of tensors that are weights as they are."""

    @property
    def kinds(self) -> list[str]:
        """Return the formats in the checkpoint."""
        return sorted({weight.kind for weight in self.weights.values()})


def find_stored_weights(entries: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> StoredWeights:
    """Group a checkpoint's tensors into weights; `settings` is the config's section about quantization.

    Raises ModelError that names the tensor if one is missing or has another shape than the weight implies, and
    UnsupportedModel for a format that is not known.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in entries:
        base, role = role_of(name)
        group = groups.setdefault(base, {})
        if role in group:
            raise UnsupportedModel(f"tensors {group[role]} and {name} mean the same: use another checkpoint")
        group[role] = name
    weights: dict[str, StoredWeight] = {}
    plain: set[str] = set()
    for base, parts in groups.items():
        if _is_plain(base, parts, entries):
            plain.update(parts.values())
        else:
            weights[base] = recognize(base, parts, entries, settings)
    return StoredWeights(weights, frozenset(plain))


def role_of(name: str) -> tuple[str, str]:
    """Return the name of the weight to which a tensor belongs, and the tensor's role in it."""
    for end in sorted(APPENDED, key=len, reverse=True):
        if name.endswith(end):
            return name.removesuffix(end), APPENDED[end]
    module, _, last = name.rpartition(".")
    return (f"{module}.weight", OF_MODULE[last]) if last in OF_MODULE else (name, "weight")


def _is_plain(base: str, parts: Mapping[str, str], entries: Mapping[str, TensorEntry]) -> bool:
    """Return whether tensors are used as they are: none is of few bits, or it is a lone table of integers."""
    if len(parts) == 1 and not base.endswith(".weight") and entries[next(iter(parts.values()))].dtype in INTEGERS:
        return True
    return all(entries[name].dtype not in LOW_BITS for name in parts.values())
